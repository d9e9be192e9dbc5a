"""What a model can do (KIND "eval") and what its features hold (KIND "probe"), one file each."""
