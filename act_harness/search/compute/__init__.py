"""The computation of a search: one head's change on one document, many at once."""
