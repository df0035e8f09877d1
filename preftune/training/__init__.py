"""One loop for every objective. `step` alone joins the engine and the losses."""
