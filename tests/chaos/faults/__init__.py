"""One file for each kind of fault. A row is a function of a site, the number of runs and a random generator."""
