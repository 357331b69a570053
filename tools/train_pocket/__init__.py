"""Training of the pocket model that tokenprune ships. Not part of the package."""
