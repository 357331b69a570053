"""Language models: how a prompt is shortened inside while it keeps its length outside."""
