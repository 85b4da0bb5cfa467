"""Experiments as functions of (model, images, options): for notebooks, scripts and commands alike."""
