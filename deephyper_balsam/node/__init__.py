"""What runs on a compute node: light imports, no Balsam."""
