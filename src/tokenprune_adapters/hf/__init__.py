"""The wall to transformers: the names that it uses, and where the parts of its models sit."""
