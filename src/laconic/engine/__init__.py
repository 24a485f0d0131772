"""How a model streams through stages: plan, walk, observe, write. Names no method."""
