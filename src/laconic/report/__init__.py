"""Reports of artifacts and their results: tables, charts, one HTML page, and the catalogue of methods and recipes."""
