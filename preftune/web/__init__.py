"""People judge pairs of answers, on a page or in a terminal. Reads data and writes judgments; never imports what trains."""
