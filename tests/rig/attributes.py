"""What an object holds, whatever its class: one that is compiled has no `__dict__`."""

from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any


def attributes(owner: object) -> dict[str, Any]:
    """Its attributes that are set, by name, without its class's."""
    found: dict[str, Any] = dict(getattr(owner, "__dict__", {}))
    for kind in type(owner).__mro__:
        for name, member in vars(kind).items():
            is_slot = isinstance(member, GetSetDescriptorType | MemberDescriptorType)
            if is_slot and name not in ("__dict__", "__weakref__") and hasattr(owner, name):
                found[name] = getattr(owner, name)
    return found
