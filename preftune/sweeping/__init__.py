"""One recipe, many settings: runs of a grid or a search, evaluated alike and put on one table."""
