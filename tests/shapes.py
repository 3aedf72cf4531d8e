"""What checks the annotated shapes and types of the packages while the tests run."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for
