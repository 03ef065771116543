"""docs/config.md holds the current table of config keys."""

import pytest

from glimpse.run.lib import config_table


def test_the_table_is_current():
    page = config_table.PAGE.read_text()

    assert config_table.replace_table(page) == page, (
        "docs/config.md is stale; run: python -m glimpse.run.lib.config_table --write"
    )


def test_a_changed_default_makes_the_table_stale(monkeypatch):
    page = config_table.PAGE.read_text()
    (window,) = (
        f for f in config_table.dataclasses.fields(config_table.DataConfig) if f.name == "window"
    )

    monkeypatch.setattr(window, "default", 17)

    assert config_table.replace_table(page) != page


def test_a_key_without_a_description_is_an_error(monkeypatch):
    monkeypatch.setattr(config_table, "read_field_comments", lambda cls: {})

    with pytest.raises(ValueError, match="no comment; describe the key in a comment above it"):
        config_table.config_table()
