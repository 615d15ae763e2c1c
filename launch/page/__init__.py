"""A run, or a chain of runs, as one HTML file to mail: the verb `report`."""
