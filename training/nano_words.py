"""Words for HRM-Text-Nano's questions: people and things of the word problems, words to spell."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Leo", "Mia", "Noah", "Sara", "Tom")

ITEMS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pens", "shells", "stamps")

# Parts of made-up words: onset, vowel, coda of a syllable. What stands there twice is drawn twice as often.
PSEUDO_ONSETS = _words("b c d f g h j k l m n p q r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr sh st th tr")
PSEUDO_VOWELS = _words("a e i o u a e i o u ai ea ee oa oo ou")
PSEUDO_CODAS = ("", "", "", *_words("b c d g l m n p r s t x z ck ll mp nd ng nk nt rd rn rt ss st tt"))

WORDS = _words(
    """
    apple arrow autumn bacon badge baker banana barrel basket beach bean bear berry bike bird blanket boat book
    boot bottle bowl bread brick bridge broom brush bucket bunny butter button cabin camel camera candle canvas
    carpet carrot castle cat cave chair chalk cheese cherry chess chicken circle city clock cloud clover coat
    coffee coin color comb copper corn cotton cow crab crayon cream cricket crow crown cup dance desert desk
    diamond dinner dog doll door dragon dream dress drum duck eagle earth engine face family farm feather fence
    field finger fire fish flag flame flute fog forest fork fox frog fruit garden garlic ghost giant ginger glass
    globe glove goat gold goose grape grass green guitar hammer harbor hat hazel hen hill hockey honey hook horse
    hotel house ice ink iron island ivory jacket jar jelly jewel jungle kettle key king kite kitten knife ladder
    lake lamp leaf lemon letter light lily lion lizard llama lunch magnet mango map maple market mask meadow melon
    metal milk mirror mitten monkey moon morning moss moth motor mouse music mustard nail nest night noodle north
    nut ocean olive onion orange otter oven owl paddle paint palace pan panda paper parrot pasta path peach pearl
    pebble pencil pepper piano pillow pilot pine pizza plane plant plate plum pocket pond pony potato puddle
    pumpkin puppy puzzle queen quilt rabbit radio rain raven ribbon rice ring river road robin rocket roof root
    rope rose rubber ruler sail salad salt sand scarf school seed shadow sheep shelf shell ship shirt shoe silk
    silver sister skirt sky snail snow soap sock soup south spider spoon spring square star stick stone storm
    street sugar summer sun swan table tail tea teapot temple tent tiger toast tomato tower town toy train tree
    truck tulip tunnel turkey turtle valley vanilla velvet village violet violin wagon wall walnut water wheel
    whistle willow window wine winter wolf wood wool yard yellow zebra zipper
    """
)
