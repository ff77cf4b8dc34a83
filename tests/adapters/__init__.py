"""A package, so that the name of its conftest differs from that of the one above."""
