"Hands the facts in settings.ini to pip: nbdev 3 no longer reads that file, and facts should stand in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent/"settings.ini", encoding="utf-8")
facts = ini["DEFAULT"]
setup(
    name=facts["lib_name"], version=facts["version"], description=facts["description"],
    long_description=(Path(__file__).parent/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    license=facts["license"], author=facts["author"], keywords=facts["keywords"].split(),
    classifiers=facts["classifiers"].strip().splitlines(),
    packages=find_packages(include=["llmbench*"]),
    install_requires=facts["requirements"].split(), extras_require={"dev": facts["dev_requirements"].split()},
    entry_points={"console_scripts": facts["console_scripts"].split()},
)
