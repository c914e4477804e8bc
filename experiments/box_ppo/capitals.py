"Questions with a checkable answer, and a mark that wants it right and brief"
CAPITALS = dict(France="Paris", Japan="Tokyo", Germany="Berlin", Italy="Rome", Spain="Madrid", Russia="Moscow", China="Beijing", India="Delhi", England="London", Greece="Athens", Egypt="Cairo", Cuba="Havana",
                Portugal="Lisbon", Austria="Vienna", Norway="Oslo", Sweden="Stockholm", Finland="Helsinki", Ireland="Dublin", Poland="Warsaw", Hungary="Budapest", Turkey="Ankara", Iran="Tehran", Iraq="Baghdad", Peru="Lima",
                Canada="Ottawa", Mexico="Mexico City", Kenya="Nairobi", Denmark="Copenhagen", Belgium="Brussels", Argentina="Buenos Aires", Thailand="Bangkok", Vietnam="Hanoi", Chile="Santiago", Nepal="Kathmandu", Romania="Bucharest", Scotland="Edinburgh")
LONGEST = 20  # tokens of an answer


def rows(names): return [dict(prompt=f"What is the capital of {name}?", capital=CAPITALS[name]) for name in names]


TRAIN, HELD_OUT = rows(list(CAPITALS)[:24]), rows(list(CAPITALS)[24:])


def right_and_brief(samples):
    "1 - tokens/20 for an answer that names the capital and comes to its end, else 0"
    return [(1 - len(s.ids)/LONGEST)*(s.ended and s.prompt.task["capital"] in s.text) for s in samples]
