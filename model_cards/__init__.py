"""Model cards: for each method a recipe with its provenance (NAME.yaml) and a page about it (NAME.md)."""
