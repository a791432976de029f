"""What a captioner is asked: templates from a YAML file, one drawn for each sample and attempt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from paradiffusion.errors import UserError
from paradiffusion.randomness import uniform

_KEYS = {"kind", "weight", "ask", "accept", "text"}


@dataclass(frozen=True)
class Template:
    """One way to ask for a caption.

    Attributes:
        kind: the caption kind that it is for.
        weight: how often it is drawn, relative to the others.
        ask: the fewest and most words asked for.
        accept: the fewest and most words that pass.
        text: the request, with {low} and {high} for ``ask``.
    """

    name: str
    kind: str
    weight: float
    ask: tuple[int, int]
    accept: tuple[int, int]
    text: str

    def prompt(self) -> str:
        """The request as the model reads it."""
        return self.text.replace("{low}", str(self.ask[0])).replace("{high}", str(self.ask[1]))


def load_templates(path: Path, kind: str, names: str | None = None) -> list[Template]:
    """The templates of ``path`` that are to be drawn.

    Args:
        kind: all templates of this kind are taken where ``names`` is None.
        names: "paper,spatial", or with weights "paper:3,spatial:1".

    Raises:
        UserError: where the file or a name is wrong.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise UserError(
            f"prompt_file={path} cannot be read ({error.strerror}); give a YAML file of templates."
        ) from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"prompt_file={path} is not YAML ({reason}); see configs/caption_prompts.yaml.") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"prompt_file={path} holds no templates; see configs/caption_prompts.yaml for the form.")
    known = {str(name): _template(path, str(name), value) for name, value in content.items()}
    if names is None:
        chosen = [template for template in known.values() if template.kind == kind]
        if not chosen:
            raise UserError(
                f"no template of {path} is for kind={kind}; name some with prompts={','.join(known)}, or set prompt_file=."
            )
        return chosen
    chosen = []
    for part in names.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in known:
            raise UserError(
                f"prompts={names}: the template {name!r} is not in {path}; choose among {', '.join(known)}."
            )
        template = known[name]
        if weight:
            template = Template(**{**template.__dict__, "weight": _weight(f"prompts={names}", weight)})
        chosen.append(template)
    return chosen


def draw(templates: list[Template], attempt: int, *identity: int | str, used: frozenset[str] = frozenset()) -> Template:
    """The template of a sample's attempt, a function of ``identity``; those in ``used`` only when no other is left."""
    left = [template for template in templates if template.name not in used] or templates
    point = uniform("caption template", attempt, *identity) * sum(template.weight for template in left)
    for template in left:
        point -= template.weight
        if point < 0:
            return template
    return left[-1]


def _template(path: Path, name: str, value: Any) -> Template:
    where = f"the template {name} of {path}"
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"].strip():
        raise UserError(f"{where} has no text; write text: under it, as configs/caption_prompts.yaml does.")
    unknown = sorted(str(key) for key in value if key not in _KEYS)
    if unknown:
        raise UserError(f"{where} has the unknown key {unknown[0]}; its keys are {', '.join(sorted(_KEYS))}.")
    return Template(
        name=name,
        kind=str(value.get("kind", "long")),
        weight=_weight(where, value.get("weight", 1.0)),
        ask=_range(f"{where}, ask", value.get("ask", [100, 500])),
        accept=_range(f"{where}, accept", value.get("accept", [50, 500])),
        text=value["text"].strip(),
    )


def _weight(where: str, value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{where} has the weight {value}; give a number above 0.")
    return weight


def _range(where: str, value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value):
        low, high = value
        if 0 < low <= high:
            return low, high
    raise UserError(f"{where}, is {value}; give the fewest and most words, such as [100, 500].")
