"""The foundation of the other packages: errors, files, ranks, devices, signals."""
