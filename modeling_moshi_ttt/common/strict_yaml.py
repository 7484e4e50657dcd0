"""YAML in which a key stands once: of two, the parser would take the last and say nothing."""

from collections.abc import Hashable
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, with its line."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """As the parent's.

        Raises:
            yaml.YAMLError: a key stands twice.
        """
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice; keep one", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
