"""What pyproject.toml cannot say: an installed niels-gpt carries configs/ and data/ inside its package.

In a checkout they stay where people look for them (`niels_gpt.paths` finds them in either place).
"""

from setuptools import find_packages, setup

SHIPPED = {"niels_gpt.shipped.configs": "configs", "niels_gpt.shipped.data": "data"}

setup(
    packages=[*find_packages(include=["niels_gpt*", "train*", "scripts*"]), *SHIPPED],
    package_dir={**SHIPPED},
    package_data={
        "niels_gpt": ["plan/*.json", "native/*.h", "*/native/*.h", "*/native/*.cpp"],
        "niels_gpt.shipped.configs": ["*.json", "*.txt"],
        # by name: data/ is also where a working copy keeps caches and notes
        "niels_gpt.shipped.data": ["primer.txt", "primer.jsonl", "primer_heldout.jsonl", "public_facts.json"],
    },
)
