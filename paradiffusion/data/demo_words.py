"""Words and sentence forms of the built-in data set's captions.

Every tuple holds ways to say the same thing; one that stands there twice is said twice as often.
"""

from __future__ import annotations

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart",),
    "ring": ("ring", "ring", "ring", "hoop"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized", "medium"),
    "large": ("large", "large", "big"),
}
TEXTURE_BEFORE: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "uniform"),
    "striped": ("striped", "striped", "diagonally striped"),
    "outlined": ("outlined", "boldly outlined", "thickly outlined"),
}
TEXTURE_AFTER: dict[str, tuple[str, ...]] = {
    "plain": ("with a plain surface", "in one solid colour", "with a uniform fill"),
    "striped": ("with diagonal stripes", "with stripes across it", "covered in stripes"),
    "outlined": ("with a thick outline", "with a bold outline", "with an outline around it"),
}
TEXTURE_STATED: dict[str, tuple[str, ...]] = {
    "plain": ("has a plain surface", "is filled with one solid colour", "has a uniform fill"),
    "striped": ("has diagonal stripes", "is covered in stripes", "is striped from side to side"),
    "outlined": ("has a thick outline", "is framed by a bold outline", "has an outline around it"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "top left": (
        "in the top left corner",
        "at the top left",
        "in the upper left",
        "in the upper left corner",
        "in the top left part",
        "in the upper left quarter",
    ),
    "top right": (
        "in the top right corner",
        "at the top right",
        "in the upper right",
        "in the upper right corner",
        "in the top right part",
        "in the upper right quarter",
    ),
    "bottom left": (
        "in the bottom left corner",
        "at the bottom left",
        "in the lower left",
        "in the lower left corner",
        "in the bottom left part",
        "in the lower left quarter",
    ),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the lower right",
        "in the lower right corner",
        "in the bottom right part",
        "in the lower right quarter",
    ),
}
SHORT_PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("top left", "upper left", "in top left corner", "at the top left"),
    "top right": ("top right", "upper right", "in top right corner", "at the top right"),
    "bottom left": ("bottom left", "lower left", "in bottom left corner", "at the bottom left"),
    "bottom right": ("bottom right", "lower right", "in bottom right corner", "at the bottom right"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain {c} background", "flat {c} background", "uniform {c} background"),
    "gradient": ("{c} background with a soft gradient", "softly shaded {c} background", "{c} gradient background"),
    "dots": ("{c} background with faint dots", "faintly dotted {c} background", "{c} background with a dot pattern"),
    "stripes": (
        "{c} background with faint vertical bands",
        "{c} background with faint upright bands",
        "banded {c} background",
    ),
}

# {n} the object with its article, {N} the same at the start of a sentence, {p} / {P} its place.
LONG_OBJECT = (
    "{P} there is {n}.",
    "{P} sits {n}.",
    "{P} we find {n}.",
    "{P}, {n} can be seen.",
    "{P} one notices {n}.",
    "{P} you can see {n}.",
    "{N} sits {p}.",
    "{N} is placed {p}.",
    "There is {n} {p}.",
    "{N} appears {p}.",
    "You can see {n} {p}.",
    "The picture shows {n} {p}.",
    "{N} has been drawn {p}.",
    "Also visible is {n} {p}.",
)
LONG_SPLIT = (
    "{P} there is {n}. It is {s} and {t}.",
    "{N} sits {p}. It is {s}, and it {t}.",
    "{P} we find {n}, {s} in size. It {t}.",
    "{N} is located {p}. This {s} shape {t}.",
    "There is {n} {p}. It {t} and is {s}.",
    "{P} stands {n}, which {t}. It is {s}.",
)
CLEAN_OBJECT = (
    "{N} lies {p}.",
    "{P} lies {n}.",
    "{P} is {n}.",
    "{N} is {p}.",
    "{P} there is {n}.",
    "{N} stands {p}.",
    "{P} stands {n}.",
    "{N} can be found {p}.",
    "{P}, there is {n}.",
    "{N} rests {p}.",
    "{P} rests {n}.",
    "{N} is positioned {p}.",
    "{P} appears {n}.",
)
PAIR = (
    "{N0} is {p0}, while {n1} is {p1}.",
    "{P0} is {n0}, and {p1} is {n1}.",
    "{N0} sits {p0} and {n1} {p1}.",
    "{P0} there is {n0}; {p1} there is {n1}.",
)
GROUND = (
    "The whole scene is set on {b}.",
    "Everything is drawn on {b}.",
    "Behind it all is {b}.",
    "All of this lies on {b}.",
    "The scene has {b}.",
    "It is set against {b}.",
    "The picture has {b}.",
    "The backdrop is {b}.",
    "{B} fills the rest of the picture.",
    "{B} lies behind everything.",
    "{B} surrounds what is shown.",
    "One sees {b} throughout.",
)
INTROS = (
    "This {f} picture shows {k} on {b}.",
    "The {f} image shows {k} against {b}.",
    "A {f} drawing of {k}.",
    "We see a {f} picture with {k}.",
    "This is a simple {f} drawing with {k}.",
    "The {f} illustration contains {k}.",
    "Here is a {f} image that contains {k}.",
    "A {f} canvas carries {k}.",
    "This {f} graphic presents {k}.",
    "The {f} picture is made of {k}.",
    "In this {f} image there is a scene with {k}.",
    "A minimal {f} composition of {k}.",
)
IDLE_LONG = (
    "The style is flat and graphic, with clean shapes.",
    "Nothing else is shown in the picture.",
    "The composition is simple and easy to read.",
    "The overall impression is calm and uncluttered.",
    "There is no text and there are no people in the image.",
    "The rest of the canvas remains empty.",
    "It looks like a simple piece of graphic design.",
    "The arrangement leaves plenty of empty space.",
    "The geometric forms stand out clearly from what lies behind them.",
    "The viewer sees everything straight from the front.",
    "The scene contains no further elements or details.",
    "Overall, the image feels tidy and easy to understand.",
    "There is no sense of depth, since everything is drawn flat.",
    "The drawing is abstract and does not depict a real place.",
)
IDLE_CLEAN = (
    "Nothing else appears in the picture.",
    "The rest of the canvas is empty.",
    "There is no text anywhere.",
    "The drawing is flat and simple.",
    "No other shape is present in this scene.",
    "The composition is calm and uncluttered.",
    "Everything is seen straight from the front.",
    "The remaining area is left free of any shape.",
)
COUNTS = {
    1: ("a single shape", "one shape", "just one object", "a lone geometric shape"),
    2: ("two shapes", "a pair of objects", "two separate objects", "two geometric shapes"),
    3: ("three shapes", "three objects", "a group of three shapes", "three geometric shapes"),
    4: ("four shapes", "four objects", "a group of four shapes", "four geometric shapes"),
}

RELATIVE = (
    "The {a} is {r} the {b}.",
    "Seen from the {b}, the {a} is {x}.",
    "The {a} can be found {r} the {b}.",
    "Note that the {a} is {r} the {b}.",
    "Compared with the {b}, the {a} is placed {x}.",
    "Thus the {a} lies {r} the {b}.",
)
REPEATED = (
    "The {a} is {s}.",
    "As for the {a}, it {t}.",
    "The {a}, seen {p}, is {s}.",
    "Looking closely, the {a} {t}.",
    "It is worth noting that the {a} {t}.",
    "The {a} {p} is easy to spot.",
)

# {n} the object without article, {a} with it.
SHORT_OBJECT = ("{n} {p}", "{n} {p}", "{p} {n}", "{p}: {n}", "{n}, {p}", "{a} {p}", "{p} {a}", "{p} is {a}")
SHORT_GROUND = ("{b}", "{b}", "on {a}", "all on {a}", "with {a}")
SHORT_OPENING = ("drawing of", "picture:", "clipart,", "simple graphic,", "vector art:", "image of", "design with")
SEPARATORS = (", ", ", ", " and ", "; ", " / ")
