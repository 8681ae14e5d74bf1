"""Recipes: typed and validated configuration of runs, without torch.

A recipe is YAML plus `key=value` overrides. `load` returns one validated, frozen object or raises `InputError` with
every problem at once, each under its dotted path.
"""

from distill.recipe.augment import Augment
from distill.recipe.loading import from_mapping, known_part, load, load_teachers_recipe
from distill.recipe.reading import read_mapping, read_yaml
from distill.recipe.schema import FROM_PYTHON, OPERATIONAL_KEYS, Data, Pretrain, Recipe, Teacher
from distill.recipe.sizes import VIT_SIZES
from distill.recipe.variants import reader_names, reader_of, recipe_model, used

__all__ = [
    "FROM_PYTHON",
    "OPERATIONAL_KEYS",
    "VIT_SIZES",
    "Augment",
    "Data",
    "Pretrain",
    "Recipe",
    "Teacher",
    "from_mapping",
    "known_part",
    "load",
    "load_teachers_recipe",
    "read_mapping",
    "read_yaml",
    "reader_names",
    "reader_of",
    "recipe_model",
    "used",
]
