"""The value of a formula in LaTeX, as far as the formulas of the gallery go: what is written is what is computed."""

import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\S")
SILENT = {r"\left", r"\right", r"\,", r"\cdot"}
WORDS = {r"\mathrm", r"\mathtt", r"\text"}
FUNCTIONS = {r"\ln": math.log, r"\exp": math.exp, r"\arctan": math.atan}
ORDER = {"<": operator.lt, ">": operator.gt, "=": operator.eq, r"\le": operator.le, r"\ge": operator.ge}
STOP = {")", "]", "}", ",", "&", r"\\", r"\end", "+", "-", None, *ORDER}
CLOSING = {"(": ")", "[": "]"}  # what is in square brackets is a constant for the gradient: the value is the same


class Formula(dict):
    """The symbols of a formula: those that are given, and those that its own lines define, worked out when they are
    asked for. A symbol is written without its commands: ``alpha``, ``d_x``, ``w*``.

    >>> Formula(r"L = \\frac{a^2}{2 b}, \\quad b = \\left| c \\right| + 1", a=4.0, c=-1.0)["L"]
    4.0
    """

    def __init__(self, latex: str, **given: Any) -> None:
        super().__init__({"e": math.e, "pi": math.pi, **given})
        self.clauses: dict[str, list[str]] = {}
        for clause in re.split(r",\s*\\quad|\n", latex.strip()):
            left, equals, right = clause.partition("=")
            if equals and not re.search(r"\\text\{[^}]* ", right):  # which is said in words
                self.clauses["".join(self.names(left))] = TOKEN.findall(right)

    @staticmethod
    def names(latex: str) -> Iterator[str]:
        """The letters of the left-hand side of a definition."""
        return (t.removeprefix("\\") for t in TOKEN.findall(latex) if t not in {"{", "}", r"\text", r"\mathrm"})

    def __missing__(self, name: str) -> Any:
        for left, right in self.clauses.items():
            head, _, arguments = left.partition("(")
            if left in (name, f"{name}^2"):
                value = Reader(right, self).whole()
                self[name] = math.sqrt(value) if left.endswith("^2") else value
                return self[name]
            if head == name and arguments:
                self[name] = self.function(arguments.rstrip(")").split(","), right)
                return self[name]
        raise KeyError(name)

    def function(self, arguments: list[str], right: list[str]) -> Callable:
        """A function that the formula defines, such as ``M(a, b)``."""

        def call(*values):
            inner = Formula("", **{**self, **dict(zip(arguments, values, strict=True))})
            inner.clauses = self.clauses
            return Reader(right, inner).whole()

        return call


class Reader:
    """Works out the value of tokens from left to right."""

    def __init__(self, tokens: list[str], symbols: Formula) -> None:
        self.tokens = [token for token in tokens if token not in SILENT]
        self.at, self.symbols, self.in_bars = 0, symbols, False

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.tokens[self.at]
        if expected not in (None, token):
            raise SyntaxError(f"{expected} and not {token} at {self.at} of {' '.join(self.tokens)}")
        self.at += 1
        return token

    def whole(self) -> Any:
        value = self.sum()
        if self.peek() not in (None, ","):
            raise SyntaxError(f"{self.peek()} is left over of {' '.join(self.tokens)}")
        return value

    def sum(self) -> float:
        sign = -1 if self.peek() == "-" else 1
        if sign < 0:
            self.take()
        value = sign * self.product()
        while self.peek() in ("+", "-"):
            value += self.product() if self.take() == "+" else -self.product()
        return value

    def product(self) -> float:
        value = self.power()
        while self.peek() not in STOP and not (self.peek() == "|" and self.in_bars):
            if self.peek() == "/":
                self.take()
                value /= self.power()
            else:
                value *= self.power()
        return value

    def power(self) -> float:
        value = self.atom()
        if self.peek() == "^":
            self.take()
            value = value ** self.atom()
        return value

    def group(self) -> float:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def word(self) -> str:
        """The letters in braces."""
        self.take("{")
        letters = []
        while self.peek() != "}":
            token = self.take()
            letters.append(self.word() if token in WORDS else token.removeprefix("\\"))
        self.take("}")
        return "".join(letters)

    def arguments(self) -> list[float]:
        self.take("(")
        values = [self.sum()]
        while self.peek() == ",":
            self.take()
            values.append(self.sum())
        self.take(")")
        return values

    def atom(self) -> Any:
        token = self.peek()
        if token == "{":
            return self.group()
        self.take()
        if token in CLOSING:
            value = self.sum()
            self.take(CLOSING[token])
            return value
        if token == "|":
            self.in_bars = True
            value = abs(self.sum())
            self.in_bars = False
            self.take("|")
            return value
        if token[0].isdigit():
            return float(token)
        if token == r"\frac":
            return self.group() / self.group()
        if token == r"\sqrt":
            return math.sqrt(self.group())
        if token in (r"\max", r"\min"):
            return (max if token == r"\max" else min)(self.arguments())
        if token in FUNCTIONS:
            return FUNCTIONS[token](self.power())
        if token == r"\begin":
            return self.cases()
        return self.symbol(self.word() if token in WORDS else token.removeprefix("\\"))

    def symbol(self, name: str) -> Any:
        if self.peek() == "_":
            self.take()
            name += "_" + (self.word() if self.peek() == "{" else self.take().removeprefix("\\"))
        if self.tokens[self.at : self.at + 2] == ["^", "*"]:
            self.at += 2
            name += "*"
        value = self.symbols[name]
        return value(*self.arguments()) if callable(value) else value

    def cases(self) -> float:
        if self.word() != "cases":
            raise SyntaxError("of all environments, only cases are known")
        chosen = None
        while self.peek() != r"\end":
            value = self.sum()
            self.take("&")
            holds = self.condition()
            chosen = value if holds and chosen is None else chosen
            if self.peek() == r"\\":
                self.take()
        self.take()
        self.word()
        if chosen is None:
            raise ValueError("no case holds")
        return chosen

    def condition(self) -> bool:
        if self.peek() == r"\text":
            self.take()
            return self.word() == "otherwise"
        left, holds = self.sum(), True
        while self.peek() in ORDER:
            compare = ORDER[self.take()]
            right = self.sum()
            holds, left = holds and compare(left, right), right
        return holds
