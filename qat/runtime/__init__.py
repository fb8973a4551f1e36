"""What everything stands on: errors, files, ranks, devices, signals."""
