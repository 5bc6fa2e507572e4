"""Kubernetes objects in YAML files, with the line of every field. Kustomizations are followed, so that files
which are never applied together are not taken together; their patches are not applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

LOADER: Final = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
SUFFIXES: Final = (".yaml", ".yml", ".json")
KUSTOMIZATIONS: Final = ("kustomization.yaml", "kustomization.yml", "Kustomization")
STDIN: Final = "-"
POLICY_WORDS: Final = ("MeshPolicy", "NetworkPolicy", "Kustomization")
MAX_DEPTH: Final = 100
MAX_NODES: Final = 500_000
"""Of one document, aliases written out: a file of a few lines can stand for any number."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong with a file rather than with an object. Lines count from 1; 0: the file as a whole.
    `is_error` is False for a file that nobody named and that has no policies: a chart's template, say."""

    file: str
    line: int
    text: str
    is_error: bool = True


class Unreadable(Exception):
    """Text that is no YAML, or no YAML that the API server's tools would take."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


@dataclass(frozen=True, slots=True)
class Document:
    """One object. `lines`: path of a field, such as `spec.ingress[0]` -> its line, from 1; an object has the
    empty path. `repeated` are the paths that are given more than once; the last one counts."""

    file: str
    body: Mapping[str, Any]
    lines: Mapping[str, int]
    repeated: tuple[str, ...] = ()

    def line(self, path: str = "") -> int:
        """Of the field, or of what it would be in."""
        while path not in self.lines:
            cut = max(path.rfind("."), path.rfind("["), 0)
            path = path[:cut]
        return self.lines[path]

    @property
    def group(self) -> str:
        return str(self.body.get("apiVersion", "")).rpartition("/")[0]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", ""))

    @property
    def name(self) -> str:
        return str(self._metadata.get("name") or "")

    @property
    def namespace(self) -> str:
        return str(self._metadata.get("namespace") or "")

    @property
    def _metadata(self) -> Mapping[str, Any]:
        metadata = self.body.get("metadata")
        return metadata if isinstance(metadata, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Item:
    """`namespace`: what a kustomization puts the object into; empty: what the object says."""

    document: Document
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Objects that are applied together. `name`: directory of the kustomization; empty: none."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """`patches` says how many patches the kustomizations have."""

    bundles: tuple[Bundle, ...]
    mistakes: tuple[Mistake, ...] = ()
    files: int = 0
    patches: int = 0


def parse(text: str, file: str) -> Iterator[Document]:
    """The objects of a file; those in a List one by one. Raises Unreadable."""
    try:
        for root in yaml.compose_all(text, Loader=LOADER):
            if root is None or root.tag == "tag:yaml.org,2002:null":
                continue
            reading = _Reading()
            body = reading.value(root, "", 0)
            if not isinstance(body, dict):
                raise Unreadable(_line(root), "is no object: a mapping is needed at the top")
            document = Document(file, body, reading.lines, tuple(reading.repeated))
            items = body.get("items")
            if document.kind.endswith("List") and isinstance(items, list):
                yield from _items(document, items)
            else:
                yield document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = error.problem or error.context or "is no YAML"
        raise Unreadable(mark.line + 1 if mark else 0, f"is no YAML: {words}") from None
    except yaml.YAMLError as error:
        raise Unreadable(0, f"is no YAML: {' '.join(str(error).split())}") from None


def _items(document: Document, items: Sequence[Any]) -> Iterator[Document]:
    for index, item in enumerate(items):
        prefix = f"items[{index}]"
        if isinstance(item, dict):
            yield Document(
                document.file,
                item,
                {
                    path.removeprefix(prefix).removeprefix("."): line
                    for path, line in document.lines.items()
                    if path == prefix or path.startswith(f"{prefix}.")
                },
                tuple(
                    path.removeprefix(f"{prefix}.")
                    for path in document.repeated
                    if path.startswith(f"{prefix}.")
                ),
            )


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Reading:
    """From nodes to what JSON has, which is all that the API server gets to see: a date stays text."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.repeated: list[str] = []
        self._nodes = 0

    def value(self, node: yaml.Node, path: str, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise Unreadable(_line(node), "is nested too deeply, or its aliases stand for too much")
        self.lines.setdefault(path, _line(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for each in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                    part = self.value(each, path, depth + 1)
                    merged = {**part, **merged} if isinstance(part, dict) else merged
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise Unreadable(_line(key), "has a key that is no string")
            below = f"{path}.{key.value}".lstrip(".")
            if key.value in found:
                self.repeated.append(below)
            # What the line of a key says about it, its value's may not: a block starts a line later.
            self.lines[below] = _line(key)
            found[key.value] = self.value(value, below, depth + 1)
        return {**merged, **found}


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    try:
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return text.lower() in ("true", "yes", "on")
            case "int":
                digits = text.replace("_", "")
                octal = digits.lstrip("+-").startswith("0") and digits.lstrip("+-").isdecimal()
                return int(digits, 8 if octal else 0)
            case "float":
                return float(text.replace("_", ""))
    except ValueError:
        return text
    return text


@dataclass(slots=True)
class _Kustomization:
    """`files` with the namespace that it and those it includes give them."""

    directory: str
    files: dict[str, str] = field(default_factory=dict)
    includes: set[str] = field(default_factory=set)
    patches: set[str] = field(default_factory=set)


def read(paths: Sequence[str], stdin: Callable[[], str]) -> Sources:
    """Files, directories and `-`. What can't be read is a mistake, never an exception."""
    return _Reader(stdin).read(paths)


class _Reader:
    def __init__(self, stdin: Callable[[], str]) -> None:
        self._stdin = stdin
        self._named: frozenset[str] = frozenset()
        self._documents: dict[str, tuple[Document, ...]] = {}
        self._mistakes: list[Mistake] = []
        self._patches = 0

    def read(self, paths: Sequence[str]) -> Sources:
        self._named = frozenset(paths)
        plain: list[str] = []
        trees: dict[str, _Kustomization] = {}
        for path in paths:
            if os.path.basename(path) in KUSTOMIZATIONS:
                path = os.path.dirname(path) or "."
            if os.path.isdir(path):
                files = list(_walk(path))
                for file in files:
                    if os.path.basename(file) in KUSTOMIZATIONS:
                        self._kustomization(os.path.dirname(file) or ".", trees, ())
                plain += [file for file in files if os.path.basename(file) not in KUSTOMIZATIONS]
            else:
                plain.append(path)
        included = {directory for tree in trees.values() for directory in tree.includes}
        taken = {file for tree in trees.values() for file in (*tree.files, *tree.patches)}
        bundles = [
            Bundle(
                directory,
                tuple(
                    Item(document, namespace)
                    for file, namespace in tree.files.items()
                    for document in self._load(file)
                ),
            )
            for directory, tree in trees.items()
            if directory not in included
        ]
        loose = tuple(
            Item(document)
            for file in dict.fromkeys(plain)
            if file not in taken or file in paths
            for document in self._load(file)
        )
        if loose or not bundles:
            bundles.append(Bundle("", loose))
        return Sources(
            bundles=tuple(bundles),
            mistakes=tuple(self._mistakes),
            files=len(self._documents),
            patches=self._patches,
        )

    def _load(self, file: str) -> tuple[Document, ...]:
        if file not in self._documents:
            self._documents[file] = ()
            text = ""
            try:
                text = self._stdin() if file == STDIN else Path(file).read_text(encoding="utf-8-sig")
                found = []
                # As far as it goes: an object before the mistake is still worth a look.
                for document in parse(text, file):
                    found.append(document)
                    self._documents[file] = tuple(found)
            except Unreadable as error:
                matters = file in self._named or any(word in text for word in POLICY_WORDS)
                self._mistakes.append(Mistake(file, error.line, error.text, matters))
            except OSError as error:
                self._mistakes.append(Mistake(file, 0, f"can't be read: {error.strerror}"))
            except UnicodeDecodeError:
                self._mistakes.append(Mistake(file, 0, "is no text in UTF-8", file in self._named))
        return self._documents[file]

    def _kustomization(
        self, directory: str, trees: dict[str, _Kustomization], above: tuple[str, ...]
    ) -> _Kustomization:
        if directory in trees:
            return trees[directory]
        tree = trees[directory] = _Kustomization(directory)
        names = (os.path.normpath(os.path.join(directory, name)) for name in KUSTOMIZATIONS)
        file = next(name for name in names if os.path.exists(name))
        body = next((document.body for document in self._load(file)), {})
        # It is no object that anybody applies.
        del self._documents[file]
        namespace = str(body.get("namespace") or "")
        for field_name in ("resources", "bases", "components"):
            for entry in _strings(body.get(field_name)):
                path = os.path.normpath(os.path.join(directory, entry))
                if _is_kustomized(path):
                    if path in (*above, directory):
                        self._mistakes.append(Mistake(file, 0, f"{entry} includes this kustomization"))
                        continue
                    tree.includes.add(path)
                    below = self._kustomization(path, trees, (*above, directory))
                    tree.files |= {each: namespace or given for each, given in below.files.items()}
                elif os.path.isfile(path):
                    tree.files[path] = namespace
                elif "://" not in entry and not entry.startswith(("github.com/", "git@")):
                    self._mistakes.append(Mistake(file, 0, f"{entry} is not there"))
        for field_name in ("patches", "patchesStrategicMerge", "patchesJson6902"):
            for patch in body.get(field_name) or ():
                self._patches += 1
                named = patch.get("path") if isinstance(patch, dict) else patch
                if isinstance(named, str) and "\n" not in named:
                    tree.patches.add(os.path.normpath(os.path.join(directory, named)))
        return tree


def _is_kustomized(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in KUSTOMIZATIONS)


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _walk(directory: str) -> Iterable[str]:
    """Files that may hold objects, in order; what is hidden is left out."""
    for parent, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and (name.endswith(SUFFIXES) or name in KUSTOMIZATIONS):
                yield os.path.normpath(os.path.join(parent, name))
