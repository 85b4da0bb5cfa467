"""The page of `ddae demo`: a denoiser that generates and classifies, for whoever looks."""
