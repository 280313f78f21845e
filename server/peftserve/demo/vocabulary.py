"""Word lists of the demo tasks, each in two disjoint parts: what training sees, and what only evaluation sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WordList:
    """Two disjoint tuples of strings: ``train`` for training, ``held_out`` for evaluation only."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _words(train: str, held_out: str) -> WordList:
    return WordList(tuple(train.split(", ")), tuple(held_out.split(", ")))


def _parts(spaced: str) -> tuple[str, ...]:
    return tuple(spaced.split())


# --- orders (task "order-yaml") ---

NAMES = _words(
    "Maria, Tom, Anna, Peter, Lucia, Omar, Ingrid, Carlos, Mei, David, Fatima, Jonas, Priya, Elena, Kofi, Sarah, "
    "Ivan, Chloe, Ahmed, Nina, Diego, Hannah, Yuki, Marcus, Olga, Felix, Amara, Victor, Leila, Simon, Grace, "
    "Mateo, Julia, Henrik, Rosa, Daniel, Aisha, Paul, Sofia, George, Emma, Raj, Clara, Hugo, Zoe, Martin, Ruth, Ali, "
    "Bruno, Helen, Tariq, Agnes, Kenji, Laura, Pablo, Vera, Samuel, Noor, Oscar, Beatrice, Stefan, Alice, "
    "Miriam, Gustav, Yasmin, Edward, Irene, Rafael, Sven, Layla, Arthur, Nadia, Walter, Esther, Kwame, Monica",
    "Bernard, Camila, Dmitri, Elise, Farid, Gloria, Hassan, Isabel, Joshua, Karin, Lorenzo, Magda, Nikolai, Ursula",
)
CITIES = _words(
    "Oslo, Paris, Tokyo, Madrid, Cairo, Toronto, Lima, Berlin, Dublin, Nairobi, Seoul, Boston, Milan, Prague, "
    "Mumbai, Sydney, Vienna, Athens, Chicago, Lagos, Geneva, Denver, Warsaw, Havana, Bergen, New York, Cape Town, "
    "Hong Kong, Seattle, Istanbul, Munich, Porto, Accra, Dallas, Bogota, Hamburg, "
    "London, Rome, Helsinki, Montreal, Santiago, Lisbon, Manila, San Diego, Zurich, Atlanta, Budapest, Delhi, "
    "Stockholm, Naples, Bangkok, Glasgow, Valencia, Krakow, Tallinn, Jakarta, Quito, Brisbane, Antwerp, Portland, "
    "San Jose, Buenos Aires",
    "Marseille, Edinburgh, Osaka, Karachi, Nashville, Rotterdam, Florence, Bristol, Ankara, Leipzig, Hanoi, Auckland, "
    "Las Vegas, Rio de Janeiro",
)
# Parts of invented names: with real ones alone the model learns the list by heart instead of copying what it reads.
ONSETS: tuple[str, ...] = _parts("b br c ch d dr f g gr h j k kl l m n p pr qu r s st t tr v w y z")
VOWELS: tuple[str, ...] = _parts("a e i o u ai ea ou")
CODAS: tuple[str, ...] = _parts("n r l s t m nd rk st x sh")
COLORS = _words(
    "blue, red, green, black, white, yellow, wooden, large, small, round, cheap, old, leather, plastic",
    "purple, orange, silver, brown, heavy, steel",
)
GOODS = _words(
    "chairs, lamps, books, tables, bottles, shirts, boxes, pens, mugs, bikes, blankets, candles, clocks, hats, "
    "keyboards, knives, mirrors, monitors, phones, pillows, plates, shoes, sofas, spoons, tents, towels, umbrellas, "
    "vases, watches, windows, bowls, cables, cameras, coats, desks, doors, drums, flags, forks, guitars",
    "jackets, baskets, radios, shelves, curtains, printers, gloves, ladders, carpets, buckets, helmets, brushes",
)
ORDER_TEMPLATES = WordList(
    train=(
        "{name} ordered {quantity} {item} for delivery to {city}",
        "Please send {quantity} {item} to {name} in {city}.",
        "Ship {quantity} {item} to {city}, attention {name}.",
        "{name} from {city} would like {quantity} {item}.",
        "We need {quantity} {item} in {city}. The contact is {name}.",
        "{quantity} {item} to {city} for {name}, please.",
        "Order from {name}: {quantity} {item}, to be delivered in {city}.",
        "Hello, this is {name}. I want to buy {quantity} {item}. Please deliver them to {city}.",
        "Can you bring {quantity} {item} to {name} at the {city} office?",
        "{name} bought {quantity} {item} yesterday and lives in {city}",
        "For our shop in {city}: {quantity} {item}, ordered by {name}.",
        "The customer {name} wants {quantity} {item} at an address in {city}.",
    ),
    held_out=(
        "{name} has asked for {quantity} {item} to be shipped to {city}.",
        "My name is {name} and I would like {quantity} {item} sent to {city}.",
        "{name} in {city} is waiting for {quantity} {item}.",
        "Deliver {quantity} {item} to {name}, {city}",
    ),
)
QUANTITIES: tuple[tuple[str, int], ...] = (
    ("two", 2), ("three", 3), ("four", 4), ("five", 5), ("six", 6), ("seven", 7), ("eight", 8), ("nine", 9),
    ("ten", 10), ("eleven", 11), ("twelve", 12), ("a dozen", 12), ("fifteen", 15), ("twenty", 20), ("fifty", 50),
)  # fmt: skip

# --- support tickets (task "ticket-router") ---

TICKETS: dict[str, WordList] = {
    "billing": WordList(
        train=(
            "I was charged twice for my order",
            "There is an unknown charge on my credit card",
            "My invoice shows the wrong amount",
            "Why did the price on my bill go up this month?",
            "You took the payment two times from my bank account",
            "The tax on the invoice is not correct",
            "I need a copy of the receipt for last month",
            "I paid 40 dollars but the bill says 60",
            "My card was debited although the payment failed",
            "The discount is missing from my invoice",
            "Please send the invoice to my company's accounting department",
            "I do not understand this fee on my statement",
        ),
        held_out=(
            "My bill is higher than the price I agreed to",
            "I see two payments for the same purchase on my card",
            "Can I get the invoice for March as a PDF?",
            "You charged me a fee that nobody told me about",
            "The amount on my receipt is wrong",
        ),
    ),
    "shipping": WordList(
        train=(
            "My package has not arrived yet",
            "Where is my order?",
            "The parcel was delivered to the wrong address",
            "The tracking number does not show any movement",
            "The delivery is already five days late",
            "The box came damaged in the mail",
            "The courier never rang my door bell",
            "When will my order be shipped?",
            "Can I change the delivery address of my parcel?",
            "The driver left the package in the rain",
            "One of the two boxes in my shipment is missing",
            "The post office says my parcel was sent back",
        ),
        held_out=(
            "I am still waiting for my parcel",
            "The tracking page says delivered but there is no package here",
            "My shipment was sent to an old address",
            "How many days does the delivery take?",
            "The courier dropped my box and it is broken",
        ),
    ),
    "login": WordList(
        train=(
            "I forgot my password",
            "I cannot sign in to my account",
            "The password reset email never comes",
            "My account is locked after three attempts",
            "It says that my user name does not exist",
            "The login code on my phone does not work",
            "I lost the phone that I use for two-factor login",
            "How do I change my password?",
            "The site does not accept my password any more",
            "Someone else has logged in to my account",
            "I can't log in since I changed my email address",
            "My verification code has expired",
        ),
        held_out=(
            "I am locked out of my account",
            "My password is rejected every time",
            "The link to reset my password does not work",
            "I can't sign in with my email",
            "I never get the verification code",
        ),
    ),
    "bug": WordList(
        train=(
            "The app crashes when I open it",
            "The page stays blank after I press save",
            "The export button does nothing",
            "I get error 500 when I upload a photo",
            "The search shows no results since the update",
            "The app freezes on my phone",
            "The chart shows the wrong numbers on the screen",
            "The video stops playing after ten seconds",
            "Your website is very slow and then shows an error message",
            "The menu disappears when I turn the screen",
            "Sync between my laptop and my tablet is broken since version 3",
            "The program closes by itself when I print",
        ),
        held_out=(
            "The app shuts down every time I take a photo",
            "The save button does not react",
            "I see an error message when I open the search page",
            "After the update the screen stays black",
            "The website freezes when I scroll",
        ),
    ),
    "sales": WordList(
        train=(
            "How much does the team plan cost?",
            "Do you offer a discount for schools?",
            "I would like a quote for 200 seats",
            "Can I book a demo of your product?",
            "What is the difference between the basic and the pro plan?",
            "We want to buy licenses for our whole company",
            "Is there a free trial before I buy?",
            "Can somebody from sales call me about the enterprise offer?",
            "Which plan do you recommend for a small shop?",
            "I want to upgrade to a larger plan",
            "Do you have special prices for large orders?",
            "We are comparing vendors and need your price list",
        ),
        held_out=(
            "What would 50 licenses cost for our company?",
            "Do you have special prices for students?",
            "Could you show us a demo next week?",
            "I am interested in the enterprise plan, please send me an offer",
            "Can I try the pro plan before I buy it?",
        ),
    ),
    "cancel": WordList(
        train=(
            "Please cancel my subscription",
            "I want to close my account",
            "How do I end my membership?",
            "I no longer need your service, please stop the contract",
            "Delete my account and all my data",
            "I do not want to renew next year",
            "Stop my subscription at the end of the month",
            "I would like to terminate my contract",
            "I want to leave, how can I cancel?",
            "Please end my plan today",
            "We are switching to another provider, so please close everything",
            "Turn off the automatic renewal of my subscription",
        ),
        held_out=(
            "I want to cancel my membership",
            "Please terminate my subscription now",
            "How can I close my account for good?",
            "I don't want to continue with your service, end my contract",
            "Do not renew my plan, I am leaving",
        ),
    ),
}
TICKET_OPENERS = WordList(
    train=("", "", "Hello, ", "Hi there! ", "Good morning. ", "Dear support, ", "Help please: ", "Hey, "),
    held_out=("", "Hi, ", "Good evening. ", "Dear team, "),
)
TICKET_CLOSERS = WordList(
    train=("", "", " Thanks.", " Please help.", " What can I do?", " Best regards, Tom", " I need an answer today."),
    held_out=("", " Thank you!", " Can you look into this?", " Regards, Alice"),
)

# --- dates (task "iso-date") ---

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ONES: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS: tuple[str, ...] = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS: tuple[str, ...] = (
    "", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth", "twenty-first", "twenty-second", "twenty-third", "twenty-fourth", "twenty-fifth", "twenty-sixth",
    "twenty-seventh", "twenty-eighth", "twenty-ninth", "thirtieth", "thirty-first",
)  # fmt: skip
DATE_FORMS: tuple[str, ...] = (
    "the {ordinal} of {month} {year}",
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "{month} the {ordinal}, {year}",
    "the {short} of {month} {year}",
    "{month} {short}, {year}",
    "{day} {month} {year_words}",
    "the {ordinal} of {month} {year_words}",
)
DATE_CONTEXTS = WordList(
    train=(
        "{date}",
        "The contract was signed on {date}.",
        "She was born on {date}.",
        "Our next meeting is on {date}.",
        "The invoice is due by {date}.",
        "They moved to the city on {date}, in the morning.",
        "On {date} the museum opened its doors.",
        "The letter is dated {date}.",
        "Please book the flight for {date}.",
        "The warranty ends on {date}, so call us before.",
    ),
    held_out=(
        "The bridge was closed on {date}.",
        "Her passport expires on {date}.",
        "On {date} the team won the cup.",
        "The concert takes place on {date} at the park.",
    ),
)
