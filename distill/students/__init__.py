"""Student models: vision transformers, also with other attention and a distillation token, pyramids, or any timm model.

Importing this package registers the project's models with timm: `vit_nano` ... `vit_huge`, `<kind>_vit_nano` ..., and
the pyramids' sizes.
"""

from distill.students.build import build_student
from distill.students.heads import merge_heads, one_head
from distill.students.names import check_name, register_models
from distill.students.student import Student

__all__ = ["Student", "build_student", "check_name", "merge_heads", "one_head", "register_models"]

register_models()
