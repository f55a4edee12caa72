"""Reports: a run, a sweep or a recipe as one HTML page that needs no network."""
