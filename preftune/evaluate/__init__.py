"""Whether it worked: estimates with confidence intervals, on samples and on held-out preferences."""
