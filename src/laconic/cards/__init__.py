"""The model card and the data card of an artifact: what it is made of, what that cost, and where its texts are from."""
