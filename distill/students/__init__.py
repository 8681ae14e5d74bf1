"""Student models: vision transformers, also with area attention and a distillation token, or any timm model.

Importing this package registers `vit_nano` ... `vit_huge` and `area_vit_nano` ... `area_vit_huge` with timm.
"""

from distill.students.build import build_student
from distill.students.heads import merge_heads, one_head
from distill.students.names import check_name, register_models
from distill.students.student import Student

__all__ = ["Student", "build_student", "check_name", "merge_heads", "one_head", "register_models"]
