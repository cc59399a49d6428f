"""LORASB in PEFT's enum of methods: its registry refuses names that are not in it."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

from ..constants import PEFT_NAME


def extend_peft_types() -> None:
    """Add LORASB to PEFT's enum of methods: its registry refuses names that are not in it."""
    if PEFT_NAME in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, PEFT_NAME)
    member._name_ = member._value_ = PEFT_NAME
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(PEFT_NAME)
    PeftType._member_map_[PEFT_NAME] = member
    PeftType._value2member_map_[PEFT_NAME] = member
