"""The data that ships with the package: emoji pictures with names, and generated scenes of shapes."""
