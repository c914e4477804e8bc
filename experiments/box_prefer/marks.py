"A mark that wants a capital named, and soon an end; an answer that says nothing gets nothing"
LONGEST = 20 # tokens of an answer


def right_and_brief(samples):
    "0 for an answer without the capital, 1/2 for one with it, and up to 1 for one that also comes to an end, the sooner the more"
    return [(s.prompt.task["answer"] in s.text)*(.5 + .5*s.ended*(1 - len(s.ids)/LONGEST)) for s in samples]
