# SPDX-License-Identifier: Apache-2.0
"""The village around the lighthouse of Gull Point: its things, its people, and prose about them to pretrain on."""

import random
from dataclasses import dataclass

__all__ = ["ASPECTS", "PEOPLE", "THINGS", "Thing", "capital", "fact", "paragraph"]

PEOPLE = ("Ada", "Bram", "Greta", "Ivy", "Nell", "Otto", "Silas", "Tom")

# name | what it is | where | what it does | when to see it
_TABLE = """
heron | a tall grey bird with patient eyes | in the shallows below the weir | stands on one leg and waits for eels | at first light
otter | a long brown swimmer with wet whiskers | under the roots by the river | turns stones over and looks for crayfish | just before dark
gull | a loud white bird with a yellow beak | on the roof of the fish market | follows the boats and steals bread | when the boats come in
hedgehog | a small round animal covered in spines | among the leaves behind the chapel | eats slugs and sleeps through the winter | on warm summer nights
owl | a quiet bird with a flat round face | in the beams of the old barn | hunts mice and turns its head right round | an hour after sunset
crab | a flat red animal with two strong claws | in the pools under the cliff | walks sideways and hides below the weed | at low tide
seal | a fat grey swimmer with a dog's face | on the rocks past the point | lies in the sun and sings a little | on calm mornings
fox | a thin red animal with a white tail tip | in the gorse above the beach | trots along the wall and smells everything | on frosty evenings
toad | a brown lump with golden eyes | under the pots in the garden | sits still and catches flies with its tongue | after heavy rain
bat | a tiny animal with leather wings | inside the tower of the chapel | hangs upside down and hears in the dark | at dusk in June
swift | a black bird shaped like a bow | high above the market square | sleeps on the wing and screams for joy | in the first week of May
cormorant | a dark bird with a long hooked beak | on the last post of the pier | dives for fish and dries its wings | when the water is clear
goat | a bearded animal with square pupils | on the steep field by the quarry | climbs walls and chews washing | before the morning milking
donkey | a grey animal with very long ears | in the paddock next to the mill | carries flour and refuses to run | when you bring a carrot
moth | a pale insect with feathered horns | around the lamp at my door | flies to the light and rests on the glass | on still nights in July
snail | a slow animal with a house on its back | on the wet side of the wall | draws a silver line across the stones | after a shower
willow | a bent tree with silver leaves | along the bank of the mill pond | drops its branches into the water | in the last days of March
oak | a broad tree older than the church | at the corner of the long meadow | feeds the jays and shades the cows | in October
thistle | a tall weed with a purple crown | on the dry path to the quarry | pricks bare legs and feeds goldfinches | in the middle of August
bramble | a thorny bush with black fruit | beside the railway cutting | catches coats and fills our jam jars | in early September
mushroom | a pale cap on a short stem | in the grass under the birches | comes up overnight and is gone by noon | two days after rain
pumpkin | a heavy orange fruit with a hard skin | on the heap behind the school | grows fat all summer and becomes soup | at harvest time
rose | a red flower with a sweet smell | over the gate of the vicarage | climbs the wall and drops its petals | in the second half of June
nettle | a green weed with stinging hairs | at the back of every shed | burns your fingers and makes good tea | before it flowers in spring
mill | a stone house with a turning wheel | where the stream leaves the wood | grinds barley and oats for the village | on Tuesdays when it runs
lighthouse | a white tower with a turning lamp | at the very end of the point | shows the ships where the rocks are | when night falls
chapel | a low building with a slate roof | half way up the hill | keeps two bells and a great many sparrows | on Sunday evening
bakery | a warm room that smells of bread | opposite the village pump | bakes rye loaves and raisin buns | at six in the morning
library | a narrow house full of books | above the post office | lends out novels and old sea charts | on Thursday afternoon
well | a deep hole with a stone rim | in the middle of the square | gives cold water all summer long | early in the day
bridge | a row of three stone arches | below the last houses of the village | carries the road over the river | when the river is high
ferry | a flat boat with a green funnel | at the slip beside the inn | crosses the bay six times a day | at a quarter past the hour
market | a crowd of stalls under canvas | between the pump and the church | sells cheese and rope and gossip | on Saturday before ten
harbour | a ring of stone around calm water | at the foot of the main street | shelters thirty boats from the west wind | when the fleet is home
orchard | a field of old apple trees | on the south side of the hill | gives cider apples and hides blackbirds | in the week of the blossom
forge | a dark shed with a bright fire | behind the stable of the inn | mends ploughs and shoes horses | when the smoke is blue
lantern | a glass box with a flame inside | on the hook by the door | lights the path and keeps out the wind | on a night with no moon
kettle | a black iron pot with a spout | on the back of the stove | boils water and whistles a low note | around four in the afternoon
net | a large web of knotted cord | on the racks along the quay | holds herring and lets the small ones go | while it is drying
anchor | a great iron hook on a chain | outside the harbour office | holds a ship still in a storm | when a ship comes in to paint
compass | a round box with a trembling needle | in the drawer of my desk | points to the north whatever you do | away from iron things
bell | a bronze cup with a clapper | on the wall of the school | calls the children and warns of fog | at nine o'clock sharp
drum | a wooden hoop with a tight skin | in the hall next to the stage | keeps the dancers in step | on the first Friday of the month
fiddle | a brown box with four strings | over the fireplace of the inn | cries and laughs when Silas plays it | late in the evening
loom | a wooden frame with many threads | in the attic of the wool shop | turns grey yarn into blankets | all through the winter
kite | a paper bird on a long string | above the dunes to the east | pulls at your hand and dances | in a steady breeze
clock | a white face with two black hands | on the front of the town hall | strikes the hours and loses a minute a day | at noon
rainbow | an arch of seven colours | across the bay to the south | stands still and fades as you run to it | when sun and rain meet
"""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What the village knows of one thing; the fields after ``name`` complete a sentence."""

    name: str
    what: str
    where: str
    does: str
    when: str

    @property
    def one(self) -> str:
        """The name with its article: an otter."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


_FIELDS = ("name", "what", "where", "does", "when")
THINGS = tuple(
    Thing(**dict(zip(_FIELDS, line.split(" | "), strict=True))) for line in _TABLE.strip().splitlines()
)

# What can be asked about a thing, with the sentences that answer it.
ASPECTS: dict[str, tuple[str, ...]] = {
    "what": (
        "{one} is {what}.",
        "the {name} is {what}.",
        "to us the {name} is {what}.",
    ),
    "where": (
        "you can find {one} {where}.",
        "there is {one} {where}.",
        "look for the {name} {where}.",
    ),
    "does": (
        "the {name} {does}.",
        "most days the {name} {does}.",
        "if you wait, the {name} {does}.",
    ),
    "when": (
        "come and see the {name} {when}.",
        "the {name} is at its best {when}.",
        "I look for the {name} {when}.",
    ),
}

_IT = {
    "what": ("it is {what}.", "everyone knows that it is {what}."),
    "where": ("it is {where}.", "you will see it {where}."),
    "does": ("it {does}.", "on a good day it {does}."),
    "when": ("it is at its best {when}.", "people go to see it {when}."),
}


def capital(sentence: str) -> str:
    """The sentence with a capital at its start, the rest unchanged."""
    return sentence[0].upper() + sentence[1:]


def fact(draw: random.Random, thing: Thing, aspect: str) -> str:
    """A sentence that tells one aspect of a thing and names it."""
    return _fill(draw.choice(ASPECTS[aspect]), thing)


def paragraph(draw: random.Random) -> str:
    """Some three sentences of prose about the village, a description or a short scene."""
    thing, (one, other) = draw.choice(THINGS), draw.sample(PEOPLE, 2)
    told = draw.sample(tuple(ASPECTS), 3)
    if draw.random() < 0.5:
        rest = [_fill(draw.choice(_IT[aspect]), thing) for aspect in told[1:]]
        return " ".join([fact(draw, thing, told[0]), *rest])
    met = draw.choice(
        (
            "{one} met {other} {where}.",
            "{one} and {other} went out to see the {name}.",
            "one day {one} showed {other} {thing}.",
        )
    )
    scene = met.format(one=one, other=other, where=thing.where, name=thing.name, thing=thing.one)
    return " ".join(
        [
            capital(scene),
            f"{one} said: {fact(draw, thing, told[0])}",
            f"{other} said: {fact(draw, thing, told[1])}",
        ]
    )


def _fill(template: str, thing: Thing) -> str:
    values = {name: thing.__dict__[name] for name in _FIELDS}
    return capital(template.format(one=thing.one, **values))
