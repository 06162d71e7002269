"""Finds the language model's fields in the config.json of a vision-language model.

They lie in an object of their own, `text_config`; older files of some architectures have them among the others.
"""

from __future__ import annotations

from kvrelay_engine.config_fields import ConfigFields


def text_fields(fields: ConfigFields) -> ConfigFields:
    """All fields of the file, with those of `text_config` over them where it is there."""
    inner = fields.section("text_config")
    return fields if inner is None else fields.merged(inner)
