"Questions with a checkable answer, and a mark that wants it right and brief"
CAPITALS = dict(France="Paris", Japan="Tokyo", Germany="Berlin", Italy="Rome", Spain="Madrid", Russia="Moscow", China="Beijing", India="Delhi", England="London", Greece="Athens", Egypt="Cairo", Cuba="Havana",
                Portugal="Lisbon", Austria="Vienna", Norway="Oslo", Sweden="Stockholm", Finland="Helsinki", Ireland="Dublin", Poland="Warsaw", Hungary="Budapest", Turkey="Ankara", Iran="Tehran", Iraq="Baghdad", Peru="Lima",
                Canada="Ottawa", Mexico="Mexico City", Kenya="Nairobi", Denmark="Copenhagen", Belgium="Brussels", Argentina="Buenos Aires", Thailand="Bangkok", Vietnam="Hanoi", Chile="Santiago", Nepal="Kathmandu", Romania="Bucharest", Scotland="Edinburgh")
LONGEST = 20  # tokens of an answer


def rows(names): return [dict(prompt=f"What is the capital of {name}?", capital=CAPITALS[name]) for name in names]


TRAIN, HELD_OUT = rows(list(CAPITALS)[:24]), rows(list(CAPITALS)[24:])


def right(sample): return sample.prompt.task["capital"] in sample.text


def right_and_brief(samples):
    "0 for an answer that does not name the capital, 1/2 for one that does, and up to 1 for one that also comes to an end, the sooner the more"
    return [right(s)*(.5 + .5*s.ended*(1 - len(s.ids)/LONGEST)) for s in samples]
