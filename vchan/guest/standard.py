"""Placeholder."""


def main(arguments: list[str]) -> None:
    """Not yet."""
    raise SystemExit(f"not yet: {arguments}")
