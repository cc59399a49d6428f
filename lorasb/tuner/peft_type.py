"""Adds LORASB to `PeftType`, PEFT's enum of methods."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

from ..constants import PEFT_NAME


def extend_peft_types() -> None:
    """Add LORASB to `PeftType`: `register_peft_method` refuses a name that is not a member."""
    if PEFT_NAME in PeftType.__members__:
        return
    # An enum with members cannot be subclassed or extended, so the member is made the way EnumMeta makes one: a str
    # itself, entered into the tables for iteration, for look-up by name and for look-up by value.
    member: Any = str.__new__(PeftType, PEFT_NAME)
    member._name_ = member._value_ = PEFT_NAME
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(PEFT_NAME)
    PeftType._member_map_[PEFT_NAME] = member
    PeftType._value2member_map_[PEFT_NAME] = member
