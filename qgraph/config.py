"""What to do to which part of a model: QConfig and its Rules, beside the specs of `qgraph.specs`.

The text notation is read by `qgraph.notation`; `qgraph.rules` matches rules and gives them a text form.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from re import Pattern
from typing import TYPE_CHECKING, Any

from torch import nn

from qgraph import notation, rules
from qgraph.errors import ConfigError
from qgraph.specs import MAX_BITS, MIN_STATIC_LINEAR_BITS, QuantSpec, Scheme, SparsitySpec, checked_keys, set_field

if TYPE_CHECKING:
    from qgraph.pipeline import Pipeline

__all__ = ["Match", "QConfig", "QuantSpec", "Rule", "SparsitySpec"]

Match = str | Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """A part of the model, and the config it gets instead of the model's.

    Parameters
    ----------
    match : str, re.Pattern, type of nn.Module, or callable (path, module) -> bool
        A glob over the module path (`*` crosses dots), a regular expression that is searched in it, a module
        class, or a predicate. What matches a module covers everything below it.
    config : QConfig, str or None
        None, or the notation `float`, leaves the part as it is, bit for bit.
    """

    match: Match
    config: "QConfig | str | None"

    def __post_init__(self) -> None:
        rules.check_match(self.match)
        config = QConfig.parse(self.config) if isinstance(self.config, str) else self.config
        if config is not None and not isinstance(config, QConfig):
            raise ConfigError(f"Rule: config is a QConfig, a notation or None, found {type(config).__name__}.")
        if config is not None and config.rules:
            raise ConfigError("Rule: the config of a rule has no rules of its own; put them in one list.")
        set_field(self, "config", None if config == QConfig() else config)

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether this rule names exactly this module, or (by path) one above it."""
        return rules.matches(self.match, path, module)

    def __str__(self) -> str:
        return f"{rules.describe(self.match)} -> {'float' if self.config is None else self.config}"


@dataclass(frozen=True, slots=True)
class QConfig:
    """What happens to a model: weights, activations, sparsity, and the rules for parts that differ.

    Parameters
    ----------
    weight, activation : QuantSpec, optional
        None leaves that operand in float.
    sparsity : SparsitySpec, optional
        Pruning of the weights, with or without quantization.
    rules : tuple of Rule
        The last rule that matches a module wins.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    sparsity: SparsitySpec | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        set_field(self, "rules", tuple(self.rules))
        for name, kind in (("weight", QuantSpec), ("activation", QuantSpec), ("sparsity", SparsitySpec)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"QConfig: {name} is a {kind.__name__} or None, found {value!r}.")
        if any(not isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError("QConfig: rules are Rule(match, config) values.")
        if self.weight is not None and self.weight.granularity == "token":
            raise ConfigError("QConfig: a weight has no tokens; its granularity is tensor, channel or block.")
        if self.activation is not None and self.activation.granularity == "channel":
            raise ConfigError("QConfig: an activation's granularity is tensor, token or block, found 'channel'.")
        if self.weight is not None and self.weight.range == "static":
            raise ConfigError("QConfig: a weight's scale follows the weight; range='static' belongs to activations.")
        pulled = self.sparsity is not None and self.sparsity.decay > 0
        if pulled and self.weight is not None and self.weight.method == "ddt":
            raise ConfigError(
                "QConfig: SR-STE's decay goes with method 'ste', 'lsq' or 'seq', found 'ddt', which gives pruned "
                "weights the gradient of its regression; leave the decay out."
            )
        if self.sparsity is not None and self.weight is not None and self.weight.scheme == "affine":
            raise ConfigError(
                "QConfig: a pruned weight is exactly 0, which affine levels do not hold; "
                "give the weight scheme='linear', or leave the sparsity out."
            )

    @classmethod
    def parse(cls, text: "str | QConfig") -> "QConfig":
        """Read the notation; a QConfig is returned as it is.

        >>> QConfig.parse("A4W1-2:4@128").sparsity
        SparsitySpec(kind='n:m', n=2, m=4, ratio=None, block_shape=None, decay=0.0)
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"config {text!r}: expected a QConfig or a notation such as 'A8W4@128'.")
        parts = notation.read_notation(text)
        try:
            sparsity = None if parts.sparsity is None else SparsitySpec.parse(parts.sparsity)
        except ConfigError as error:
            raise ConfigError(notation.typo(text, str(error).rstrip("."))) from error
        return cls(
            weight=_weight_spec(parts.weight, parts.group, sparsity, parts.static),
            activation=_activation_spec(parts.activation, parts.group, parts.static),
            sparsity=sparsity,
        )

    @property
    def notation(self) -> str | None:
        """The text that parses to this config, or None where there is none (rules, unusual specs)."""
        if self.rules or (self.sparsity is not None and self.sparsity.decay):
            return None
        if self == QConfig():
            return "float"
        static = self.activation is not None and self.activation.range == "static"
        spec = self.weight or (None if static else self.activation)
        group = "" if spec is None else {"tensor": "@tensor", "block": f"@{spec.group_size}"}.get(spec.granularity, "")
        bits = f"A{self.activation.bits}{'s' if static else ''}" if self.activation else ""
        bits += f"W{self.weight.bits}" if self.weight else ""
        pruned = ("-" if bits else "") + str(self.sparsity) if self.sparsity else ""
        text = bits + pruned + group
        return text if QConfig.parse(text) == self else None

    def __str__(self) -> str:
        plain = replace(self, rules=())
        text = plain.notation or ", ".join(
            f"{name}: {value}" for name in ("weight", "activation", "sparsity") if (value := getattr(self, name))
        )
        return f"{text} [{'; '.join(map(str, self.rules))}]" if self.rules else text

    def with_rules(self, *new: Rule) -> "QConfig":
        """This config with these rules in the place of its own."""
        return replace(self, rules=new)

    def add_rules(self, *new: Rule) -> "QConfig":
        """This config with these rules after its own, so that they win."""
        return replace(self, rules=(*self.rules, *new))

    def resolve(
        self, path: str, module: nn.Module, ancestors: Sequence[tuple[str, nn.Module]] = ()
    ) -> "QConfig | None":
        """The config of one module: that of the last rule that matches, else this one; None is float.

        `ancestors` are the modules above it, for rules by type and predicate; rules by path need none.
        """
        chain = ((path, module), *ancestors)
        for rule in reversed(self.rules):
            if any(rule.matches(*entry) for entry in chain):
                return rule.config  # type: ignore[return-value]  # a str was parsed in Rule.__post_init__
        return self

    def resolve_all(self, model: nn.Module) -> "dict[str, QConfig | None]":
        """The config of every module of a model, by path."""
        modules = dict(model.named_modules())
        found = {}
        for path, module in modules.items():
            above = [path[:end] for end, character in enumerate(path) if character == "."]
            chain = [(name, modules[name]) for name in ("", *above) if path and name in modules]
            found[path] = self.resolve(path, module, chain)
        return found

    def check_rules(self, named_modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Raise ConfigError for a rule that matches none of these modules, with the nearest names."""
        modules = list(named_modules)
        for rule in self.rules:
            if not any(rule.matches(path, module) for path, module in modules):
                raise ConfigError(rules.no_match(rule.match, modules))

    def pipeline(self) -> "Pipeline":
        """The passes that this config stands for."""
        from qgraph.passes import default_pipeline  # passes stand on configs, not the other way round

        return default_pipeline()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; a rule by predicate has none and is a ConfigError."""
        return {
            "weight": self.weight.to_dict() if self.weight else None,
            "activation": self.activation.to_dict() if self.activation else None,
            "sparsity": str(self.sparsity) if self.sparsity else None,
            "rules": [
                {"match": rules.match_to_data(r.match), "config": r.config.to_dict() if r.config else None}  # type: ignore[union-attr]
                for r in self.rules
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | str) -> "QConfig":
        """Read what `to_dict` wrote; a notation may stand wherever a config does."""
        if isinstance(data, str):
            return cls.parse(data)
        if isinstance(data, Mapping) and "notation" in data:
            rest = {key: value for key, value in data.items() if key != "notation"}
            if not set(rest) <= {"rules"}:
                raise ConfigError(f"QConfig: 'notation' takes only 'rules' beside it, found {sorted(rest)}.")
            return cls.parse(data["notation"]).with_rules(*map(_rule_from_data, rest.get("rules") or ()))
        values = checked_keys("QConfig", data, cls)
        for name in ("weight", "activation"):
            if values.get(name) is not None:
                values[name] = QuantSpec.from_dict(values[name])
        if values.get("sparsity") is not None:
            values["sparsity"] = SparsitySpec.parse(values["sparsity"])
        values["rules"] = tuple(map(_rule_from_data, values.get("rules") or ()))
        return cls(**values)

    def to_json(self) -> str:
        """The dict as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "QConfig":
        """Read what `to_json` wrote."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"config: not JSON: {error}.") from error

    def to_yaml(self) -> str:
        """The dict as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "QConfig":
        """Read what `to_yaml` wrote."""
        import yaml

        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"config: not YAML: {error}.") from error


def _weight_spec(
    bits: float | None, group: int | str | None, sparsity: SparsitySpec | None, static: bool
) -> QuantSpec | None:
    if bits is None:
        return None
    # Integer kernels beside a static activation take weights without zero points.
    scheme: Scheme | None = "linear" if sparsity is not None or (static and bits >= MIN_STATIC_LINEAR_BITS) else None
    if isinstance(group, int):
        return QuantSpec(bits, scheme, "block", group)
    return QuantSpec(bits, scheme, "tensor" if group == "tensor" else "channel")


def _activation_spec(bits: float | None, group: int | str | None, static: bool) -> QuantSpec | None:
    if bits is None:
        return None
    if static:
        return QuantSpec(bits, granularity="tensor", method="ste" if bits == MAX_BITS else "ddt", range="static")
    if not isinstance(group, int):
        return QuantSpec(bits, granularity="tensor" if group == "tensor" else "token")
    if bits == MAX_BITS:  # what the fastest onnxruntime kernel computes, exactly: s = max|x| / 127 a block
        return QuantSpec(bits, "linear", "block", group, method="ste")
    return QuantSpec(bits, granularity="block", group_size=group)


def _rule_from_data(data: Any) -> Rule:
    values = checked_keys("Rule", data, Rule)
    config = values["config"]
    return Rule(rules.match_from_data(values["match"]), None if config is None else QConfig.from_dict(config))
