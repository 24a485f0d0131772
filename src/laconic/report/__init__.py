"""Reading artifacts and their results, and saying them: tables, one HTML page, the catalogue of what there is."""
