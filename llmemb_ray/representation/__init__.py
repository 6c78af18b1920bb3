"""What decides a vector besides the weights: templates, cleaning, truncation, pooling, normalisation."""

from llmemb_ray.representation.prompts import Prompter, TokenRows
from llmemb_ray.representation.representation import ROLES, Form, Pooling, Representation, Role, preset
from llmemb_ray.representation.space import Space
from llmemb_ray.representation.templates import Demonstration

__all__ = ["ROLES", "Demonstration", "Form", "Pooling", "Prompter", "Representation", "Role", "Space", "TokenRows", "preset"]
