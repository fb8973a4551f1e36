"""Files on disk: model folders, students, and the formats that engines load."""
