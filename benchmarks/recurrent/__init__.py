"""Small recurrent models trained on tasks whose answers have a known source."""
