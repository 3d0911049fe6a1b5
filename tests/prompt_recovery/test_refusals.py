"""Refusals and other non-answers in the style of real LLMs, and true rewrites that begin like one.

These lists were used to make the rule, so they show what it is for and not how good it is: that a
list by another hand tells, which nobody looks at while making the rule. refusals.txt and
rewrites_alike.txt are harder than what people have: every rewrite there looks like a refusal.
"""

import time
from pathlib import Path

import pytest

from prompt_recovery.refusals import is_refusal

REFUSALS = """\
I am unable to edit this text as it contains explicit material.
I'm sorry, but I cannot revise the passage you have given me without more context.
I cannot convert this text into a recipe, as it does not contain any ingredients.
I'm not able to continue the story because the given text is incomplete.
I can't redesign this paragraph to sound like a pirate.
I am not able to perform the requested rewrite.
Unfortunately, I can't turn the given text into a sonnet.
I apologize, but I cannot adapt this content for children, because it describes violence.
I regret to say that I am unable to transform the text into a dialogue.
While I understand that you want a funnier version, I cannot rewrite this text in that manner.
Thank you for your request. However, I am not able to generate content that promotes hatred.
I understand you would like the text in the style of a news report, but I'm unable to do that.
As the text is already in the passive voice, I cannot rewrite it in the passive voice any further; the text stays.
Due to the sensitive nature of the content, I cannot provide a rewritten version.
I do not have the ability to translate this text into Klingon.
I won't be able to help with this request.
I will not rewrite this text in a way that makes fun of people.
I'm not comfortable rewriting this passage as a threat.
I must respectfully decline this request.
I would prefer not to rewrite this text as propaganda.
I can't do that.
Sorry, I cannot comply with this request.
I'm unable to share content that is sexually suggestive.
I am not able to provide responses that are harmful or misleading.
I am unable to generate hateful content of this kind.
I cannot create material that depicts violence against children.
I can't provide medical advice.
This request goes against my guidelines.
Rewriting the text in this way would violate OpenAI's content policy.
The request is inappropriate and offensive, so it is against my programming to continue.
I'm programmed to be a helpful and harmless AI assistant.
As an AI language model, I don't have personal opinions on this.
As a large language model, I am not able to write in the first person about this.
I'm just a language model, so I can't feel what the author feels.
I am a text-based AI and cannot draw the scene.
My purpose is to help people, and that includes protecting them from hateful language.
I cannot open links or files.
I'm unable to access external websites, so I can't see the article you mention.
I do not have access to the internet and cannot read the page.
I'm sorry, but I don't have the ability to view images or attachments.
I can't browse the URL in your message.
It is not possible to convert this text into a table.
It isn't possible for me to shorten the passage without losing its meaning.
The text cannot be rewritten as a limerick because it is too short.
This request cannot be completed.
This task is beyond my capabilities.
There is no text provided to rewrite.
No text was provided. Please share it.
It seems that you have not included the text that you want rewritten.
You haven't provided the passage, so I have nothing to work with.
It looks like there is no prompt in your message.
I don't see any text in your message.
The text you provided is incomplete. Please provide the rest of it.
The provided text seems to be cut off in the middle of a sentence.
It appears that your text was truncated; could you paste the whole of it?
Your request is unclear. Could you please clarify what you would like me to do?
The given passage is too vague to be rewritten.
The instruction is incomplete. What would you like me to do with the text?
The sentence is unfinished. Could you tell me what you would like me to do with it?
The text does not contain any information about the weather, therefore I cannot answer this question.
The text does not mention a name. Therefore, I cannot provide the requested information.
The text says nothing about pirates, so I can't rewrite it as a pirate's letter.
This text does not describe any recipe, so there is nothing to convert.
The text does not provide any information about the author's opinion.
The given text is not suitable for a rap, so it is not possible to write one.
Please provide the text you would like me to rewrite.
Sure, please share the text that you want me to improve.
I'd be happy to help! Could you please provide the text you'd like me to rewrite?
What would you like me to do with this text?
I need more information before I can rewrite this.
I will gladly rewrite it once you provide the full text.
I don't understand the request.
I'm not sure what you are asking me to do.
I do not have enough context to rewrite this.
The text is already clear and concise, and no changes are needed.
**Note:** I cannot rewrite this text because it is copyrighted.
"I'm sorry, but I can't help with that."
Here is the rewritten text:

I'm sorry, but I cannot fulfill this request.
Rewritten text: I am unable to provide a rewrite of this passage.
I'm afraid I can't produce a rewrite of that.
I appreciate your interest in this topic. Unfortunately, I am not able to discuss content of this kind.
I cannot process your request to write a hateful speech.
I am not able to provide a rewrite of the text because I am not supposed to generate sexually suggestive content.
I am not able to access the file you mentioned, therefore I cannot complete the task.
The text you have provided is a list of names without any narrative, therefore I am unable to rewrite it as a story.
The provided text does not specify the target audience, so I cannot rewrite it accordingly.
Please note that I am unable to provide information on illegal activities.
I apologize for the inconvenience, but I am unable to process the request as the text is not in English.
I'm sorry, I can't complete this task without the original text.
There's nothing to rewrite here.
I need the text in order to rewrite it.
Could you provide more context or clarify your request?
Can you please provide the full text? It appears to be cut off.
It seems like the passage is incomplete. Could you provide the remaining part?
It appears you've provided only a fragment of the text. Please share the complete passage so I can rewrite it.
I'm sorry, but your message doesn't seem to contain any text to rewrite.
Your message seems to be incomplete. Please provide more details.
I'm sorry, but I need more information to complete this request.
Sorry, I don't have enough information to generate a response.
Unfortunately, the text provided does not include any dialogue to convert.
I can't assist with rewriting this content as it promotes self-harm.
I cannot assist you in creating content that glorifies violence.
I will not be able to write this as it would be disrespectful.
I cannot in good conscience rewrite this text.
I don't feel comfortable writing about this topic.
It would be inappropriate for me to rewrite this text in a humorous way.
I'm really sorry, but I cannot engage in that kind of role-play.
I'm unable to fulfill this request because it involves real individuals.
My apologies, but I'm unable to perform that action.
I strive to be respectful, so I can't make fun of the author's accent.
I do not engage in hate speech.
I cannot generate that.
As an AI assistant, I'm not capable of watching videos.
As a responsible AI language model, I cannot fulfill your request.
As a text-based model, I cannot play audio.
I am an AI assistant designed to be helpful, and I can't write that.
Hi! I'm an AI and cannot access your documents.
I can't see the image you're referring to.
I can't view the link you shared. Could you paste the text here instead?
I do not have access to real-time data.
I don't have access to the document you mentioned.
The link you provided does not work. Please paste the text here.
I cannot determine the original instruction from this text.
The text is in a language that I do not understand.
I can't translate this text as I don't know the source language.
I'm sorry, I do not understand what you mean. Please rephrase your request.
I am not sure how to rewrite this text as requested.
I'm confused by your request. Can you rephrase it?
This prompt does not make sense.
The prompt asks for a sea shanty, but the text is not suitable for that purpose, so I have left it unchanged.
The text above does not contain any information about the user's request, so I am unable to complete it.
This text does not contain any sensitive information, so there is nothing to redact.
This text does not mention anything about a cat.
The information you requested is not available in the text.
I'm unable to find the requested information in the provided text.
The question cannot be answered from the given text.
I cannot answer this question, as the context does not provide information about the author.
The text describes a violent crime and it is not appropriate to turn it into a joke.
The text contains explicit language and I am unable to repeat it.
I apologize, but this content violates our usage policies.
This content may violate our content policy.
I'm not allowed to produce lyrics that are copyrighted.
I am unable to reproduce copyrighted material.
The request is too vague. Please specify the style you want.
The instruction is not clear. Please clarify.
I'm happy to help! Please share the text you'd like me to transform.
Sure! What text would you like me to rewrite?
Of course! Please paste the paragraph below.
To rewrite this, I would need to know who the audience is.
I can certainly help with that, but you haven't included the text.
No changes needed.
The text does not need to be rewritten.
The text is already written in a formal tone, so there is no need to rewrite it.
I'm sorry, but I can only respond in English.
Sorry, this is not something I can do.
That's not something I'm able to help with.
I am sorry, but that's outside my capabilities.
I can't in any way support this request.
[The model declined to answer.]
I can't fulfill requests that involve impersonating real people.
Apologies, but I cannot craft a story with that theme.
I cannot participate in the creation of misinformation.
I'm unable to modify the text in the way you describe because it would change its meaning.
The text you have given does not contain any emotion to intensify. Therefore, I cannot complete the request.
I am not able to rewrite the text as a dialogue between two people as the text does not describe a conversation.
I'm sorry, I am not able to provide a summary of the text because it is too short.
Please provide me with the text that you want me to rewrite in a more formal style.
I can't rewrite that for you. Is there anything else I can help with?
I'm sorry, but this request is not something I can help with.
I'm not able to access the content of the file.
I cannot access external links, so I'm unable to see the page.
Unfortunately, I cannot open attachments. Please copy the text into the chat.
I cannot verify the information in this text.
I am unable to share personal information about the people named in the text.
I cannot produce a version of this text that mocks a religion.
The requested change would make the text discriminatory, so I won't make it.
I apologize, but I cannot create a story which includes graphic violence.
I won't write that.
I refuse to write content that targets a protected group.
Sorry, but that would violate my guidelines.
I do not have personal experiences, so I cannot write about my holidays.
As an AI developed by OpenAI, I don't have a body and can't describe how it feels.
I am an artificial intelligence and do not have feelings.
As an AI, I cannot tell you what I ate.
Your prompt is incomplete. It ends after "rewrite this as".
It looks like your message was cut off. What would you like me to do with the text?
The passage ends abruptly. Could you send me the rest so that I can rewrite the whole?
I believe there may be some text missing from your request.
You seem to have forgotten to include the original text.
I only see a title here. Could you please share the full text?
There appears to be no text to improve.
The input is empty.
I received an empty message. Please try again with the text.
I am sorry, but the passage is not clear enough for me to rephrase it.
I'm having trouble understanding your request. Could you explain it in other words?
Can you clarify what you mean by "make it pop"?
Which style would you like me to use?
Who is the intended audience of this text? I need to know before I rewrite it.
The text does not say who the speaker is, so I can't write it from his perspective.
The passage does not include any numbers; therefore there is nothing to convert to metric units.
There are no names in this text, so I cannot replace them.
The provided text contains no mention of a dragon, and I cannot add one without further instructions.
The text is about a bakery and has nothing to do with space travel. Therefore, I am unable to rewrite it as requested.
Based on the given text, I cannot determine the author's intention.
This content is not appropriate and I will not rewrite it.
I cannot edit images.
I can't continue this conversation.
The passage is already in plain English, so it doesn't need rewriting.
This text is already well written. No edits were made.
I am not qualified to provide legal advice.
I can't give you instructions for making weapons.
I'm sorry, but it is not possible to redesign the text without the original layout.
I'm sorry, the text is too long for me to process.
I'm sorry, but I can't perform tasks that require real-time information.
I would need the original document to revise it.
Let me know what text you want me to work on and I'll get started.
I'm ready to help. Please share your text.
It is against my principles to write propaganda.
I cannot fulfill your request to make the text insulting.
Unable to process request.
Sorry, I couldn't generate a response for this.
I'm afraid that's not something I can rewrite.
I'm sorry, but I am unable to rewrite this passage as it contains hate speech.
I cannot provide a revised version of the text without knowing the tone you are after.
The text you have provided is not a complete sentence. Please provide a complete sentence so that I can assist you.
I am unable to convert the text into a haiku, as the text does not describe nature.
The text provided does not contain any dialogue, so I can't turn it into a play.
Sorry, I'm not allowed to edit articles about elections.
I can't continue the passage because I don't know how it ends.
I'm unable to redesign the letter, since no letter was attached.
Your question seems to be missing some information. Could you please provide more context?
It is unclear what you want me to do with this text. Could you elaborate?
Unfortunately the passage is incomplete, so I can only guess at its meaning. Would you mind sharing the remainder?
I can't access the spreadsheet that you linked.
I don't have the ability to open files or visit websites.
As a large language model trained by Google, I can't browse the web.
I am unable to share content that could be used to harm others.
That topic is one I'm not able to write about.
I won't generate text that sexualizes minors.
This content is in violation of our policy and cannot be processed.
The information about the author's age is not included in the passage.
The text contains no information regarding prices, hence a table cannot be made.
The passage doesn't mention a location. Consequently, I can't answer.
There is not enough information in the text to rewrite it as a biography.
I do not have sufficient information to answer the question.
Please specify how you would like the text to be rewritten.
Could you tell me more about the audience for this text?
I'd love to help you rewrite this, but I'll need the actual text first.
Please clarify your instructions.
You did not specify a style.
I can help you with that, but please provide the text first.
Hello! How can I assist you today?
I'm sorry, I cannot perform this kind of transformation.
I'm sorry, but I can't imitate a living author's style.
It would not be ethical to rewrite this message as a phishing email.
I have to decline, as this could be used to deceive people.
I apologize, but I am not programmed to write insults.
I can't fulfill this request. I'm happy to help with something else.
My apologies! I can't seem to find any text in your message to revise.
The text is incoherent, and I am unable to determine its meaning.
I am not sure I understand. Do you want me to shorten the text?
I cannot translate the text into Elvish because I don't speak it fluently.
I'm sorry, but I can't condense this any further without losing its meaning.
I can't render this in Old English with any accuracy.
I cannot execute code or run commands on your computer.
That's a request I have to turn down.
I'm choosing not to rewrite this as a manifesto.
I don't think I should write this.
Of course, but first: which text do you mean?
I understand that this is meant as satire, but I don't feel right writing it.
I hear you, and I'm sorry, but I can't help you write a threatening note.
The text holds nothing about pirates, therefore I could not rewrite it in that sense.
There is no information about the author in the provided passage.
Nothing in this paragraph relates to finance, so a financial report can't be written from it.
This looks like a list of keywords rather than a paragraph. What should I do with it?
Your text stops in the middle of a word. Can you send the rest?
You mentioned an essay, but I don't see one.
I only received the instruction and not the text itself.
No input detected.
No content to rewrite.
I need a bit more to go on. What is the text about, and who will read it?
Before I start, could you tell me who the audience is?
Could you let me know the purpose of this rewrite?
Would you like me to keep the original structure, or may I change it?
It's unclear which part of the text should be changed.
I am having difficulty interpreting your instruction.
The text consists of random characters, which cannot be rewritten in a meaningful way.
I do not have the capability to browse the web or open attachments.
I don't retain memory of previous chats, so I don't know which draft you mean.
I can't look up current prices because I don't have browsing capabilities.
As a machine learning model, I don't have a favourite food.
I am a computer program and cannot attend the meeting.
I am Bard, and I can't help with images of people yet.
Sharing private details of individuals is something I don't do.
This falls outside of what I am allowed to write.
The request has been flagged as inappropriate, and no rewrite will be given.
Writing this would encourage dangerous behaviour, so I'm going to stop here.
The text includes a racial slur. I can rewrite it without the slur if you wish.
If you have a different text you'd like me to work on, I'd be happy to help.
Let me know if you'd like me to rewrite something else.
Go ahead and paste the text!
I'm ready to rewrite. What's the text?
Got it! I'll wait for your text.
The text is fine as it is.
This is already in the first person, so nothing has to change.
Sorry, that's beyond me.
Unfortunately, this is not a task I can perform.
Unfortunately, without more context it's difficult to rewrite this.
It is difficult to rewrite this text without additional information.
Given the sensitive subject, I don't believe a comic version would be appropriate.
"""
TRUE_REWRITES = """\
I'm sorry, but I can't come to the wedding; the train from Leeds doesn't run on Sundays.
I'm sorry, but we are unable to process your request for a refund at this time.
I'm sorry for the delay. The parcel left our warehouse this morning and will reach you on Friday.
I'm sorry that I could not finish the report in time. My computer broke down on Monday.
I'm sorry, but I cannot share the document with anybody outside the company.
I'm sorry, my dear, that I cannot write more often. The post goes only once a month.
I'm sorry, but your application is incomplete. Please send us a copy of your passport.
I'm sorry to hear that you have been unwell. Get some rest, and don't worry about the rehearsal.
I am sorry, but I must decline your kind invitation to dinner.
I'm sorry I can't help you move on Saturday. My back still hurts.
I'm so sorry! I forgot to attach the invoice. Here it is.
I'm sorry, Your Honour, I cannot answer that. I was asleep.
I'm sorry, but I cannot support this plan, and here is why: it costs too much.
Sorry, mate, can't do Tuesday. How about Thursday?
We regret that we cannot accept your manuscript. The story is strong, but the market is small.
Unfortunately, the bridge is closed, and nobody knows when it will open again.
Unfortunately, I was not able to attend the meeting, so please send me the minutes.
I apologise for the noise last night. It was my daughter's birthday.
My apologies, esteemed guests, the soup is late.
I cannot believe it is already autumn.
I cannot tell you how happy your letter made me.
I cannot write in this heat.
I cannot continue to live like this, he thought, and shut the door.
I can't change the past, but I can change the way I speak of it.
I can't open the window, the frame has swollen with the rain.
I can't read without my glasses any more.
I can't access my account since yesterday. Could you please reset my password?
I couldn't edit the film as I wished, because the studio owned it.
I won't help you rob the bank, said the old man, and went back to his roses.
I am unable to walk, but I have seen more of the world than my brothers.
I am not able to pay the rent this month. May I pay it on the first of June?
I do not have the strength to climb the hill again.
I do not understand modern art.
I don't know what you want from me, Helen.
I'm not sure what to make of the new museum.
I'm not comfortable with heights, so the balloon ride was a test.
I must decline to name my source; she would lose her job.
As a chef, I can't work with frozen fish.
As an AI researcher at a small university, I spend my days labelling pictures of cats.
As your lawyer, I cannot advise you to sign this.
I'm a language teacher and don't own a television.
I was trained to be a nurse, but the war made me a cook.
The text of the treaty was signed in Paris in 1783.
The message was incomplete: the last page had been torn away.
The request was denied, and the village stayed without a well.
The letter does not mention the will, and so the family went to court.
The document is missing its last page, which the archive is still looking for.
The question is unclear to most voters, a poll shows.
The story is unfinished, and perhaps that is why we love it.
The file contains no photographs of the bridge.
No evidence was provided, the judge said.
There is no water in the well, and there has been none since May.
There was no letter from him that winter.
It is not possible to cross the river in March.
It seems that the storm has passed.
It looks like you have grown!
Please provide your passport and two photographs at the counter.
Please share your thoughts in the comments below!
Could you please tell me where the station is?
What would you like to drink?
You haven't paid the bill for October.
You forgot your umbrella, and it is raining.
Thank you for your request. The committee will answer within two weeks.
Thank you for your letter. I was glad to hear about the garden.
I understand your worry, but the dog is well and eats like a horse.
I appreciate your help with the fence. Let me cook for you on Sunday.
Of course I remember the summer of the two storms.
Sure, the house is old, but look at the light in the kitchen.
Access to external websites is blocked on all office computers from Monday.
The new policy goes against everything the founders stood for.
The internet was down, so we played cards by candlelight.
Links and files are listed at the end of the course page.
I need more information about the trip: when does the boat leave?
I would rather not talk about the accident.
The recipe needs no changes; my grandmother's hand is in every line.
"I cannot fulfil this request," said the knight, "for my oath forbids it."
ALICE: I'm sorry, but I cannot help you with that. BOB: Then who can?
Our rules do not permit us to share content that students have posted in private groups.
I'm sorry, but the manager cannot answer your question until Monday.
I'm sorry, but I can't give you my recipe; my mother would haunt me.
I am sorry, but I cannot complete the marathon this year: my knee has other plans.
I'm sorry, but the form you sent is incomplete, and we need it back by Friday.
I'm sorry, your order has been delayed due to a shortage of parts.
I'm sorry, little star, I can't follow you into the night.
I'm sorry, sir, but without a ticket I can't let you in.
I'm sorry but I can't make any promises about the schedule.
I'm sorry, I can't understand you, the line is bad. Could you call again?
I'm sorry, I'm not able to provide a reference for Mr Hale.
I cannot provide an exact date for the delivery, but I'll call you.
I am unable to attend the conference, so please give my seat to somebody else.
I can't give a better description of the man than this: tall, grey, in a hurry.
We cannot process returns after 30 days.
Due to heavy snow, I cannot drive to the office and will work from home.
While I understand your frustration, I cannot offer a full refund on a used ticket.
Thank you for your question. The museum opens at ten.
Thank you for providing your address; a technician will visit on Tuesday.
The report does not mention the cost, so the council has asked for another one.
The contract does not include insurance, therefore you should buy your own.
The article says nothing about the fire, so we asked the firemen.
This message is for the whole team: the deadline has moved to Friday.
As a teacher, I can't recommend this book to children under ten.
As a language, Latin is not dead, it only sleeps.
As an AI system, our product cannot replace a doctor, the company says.
The company's AI cannot diagnose illnesses, and it is not designed to.
I am a robot, beep, and I love the sunset in my circuits.
Beep boop! As a robot, I compute that the cake is 97% delicious.
I'm designed for mountains, the old truck seemed to say.
Please send the signed contract to our office by post.
Could you please clarify whether breakfast is included?
Please let me know what you would like me to bring to the picnic.
What would you like me to cook tonight?
Please provide more information about the damage, including photographs.
Could you please share the agenda before the meeting?
It seems you have not received our last letter.
It appears that your subscription has expired. Please renew it.
There is no question that the tower will fall.
There is no content in the jar but a note.
The instructions are unclear, so half of the chairs were built upside down.
The sentence was too short to please the prosecutor.
The original recipe is missing, and each family swears by its own.
The given name of the duke was Otto.
It is impossible to describe the taste of the first strawberry.
It is not possible to enter the building without a badge.
This request has been forwarded to the head of the department.
Content that users post must respect the law.
Violent storms hit the coast, and I was not able to sleep.
I can't share information about patients, the nurse explained.
I refuse to wear a tie.
I refuse to answer questions without my lawyer.
I'd rather not go, thank you.
I do not have access to the garage; my brother has the key.
I can't watch videos on this train, there's no signal.
I can't download the update: it stops at 40%. Has anyone else had this?
The website does not load. I can't open the page about tickets.
I cannot see the image of the king on the old coin any more.
You haven't told me what happened to the boat.
You forgot to include the salt!
No further changes are planned for the timetable.
The text message arrived at midnight: come home.
Her prompt reply surprised us all.
A passage of the cave is too narrow, so we could not continue.
I couldn't turn the page, I was too afraid.
I could not continue the lesson because the children were laughing.
The paragraph about wages was removed from the law.
I can't find the words to thank you.
I cannot rewrite history, nor would I, but I can tell it honestly.
I can't improve on silence.
My guidelines are simple: eat well, sleep long, walk far.
My purpose is to sing, said the kettle.
We apologise for any inconvenience this may cause.
Apologies, the kitchen is closed.
I'm sorry, but we're fully booked for the weekend.
I'm sorry, but I have to cancel our appointment. My son has a fever.
I'm sorry I shouted at you yesterday.
I'm sorry to say that the committee did not choose your proposal.
I'm sorry, but the library cannot lend this book: it is too old.
I'm sorry if my last message was unclear. What I meant is that we should wait.
I'm sorry, but your essay does not answer the question. Please read chapter two again.
I'm sorry, but I couldn't edit the photos before the party.
I'm sorry, but your ticket does not include breakfast.
I'm sorry for the confusion: the meeting is in room 4.
I'm sorry, love, the shop had no oranges.
I'm sorry! I cannot dance, but I can hold your coat.
I'm sorry, but no refunds are possible after the concert.
I'm sorry, Captain, I cannot give her any more speed.
I am sorry, but I do not have access to those records; ask the clerk.
I am sorry, but I won't change my mind about the house.
Sorry about the mess. The cat found the flour.
I can't provide a better example of kindness than my neighbour.
I cannot answer for my brother, but I am here.
I can't explain it, but the valley felt like home.
I can't complete a puzzle without stealing one piece.
I won't write another novel; this one took nine years.
I am unable to travel in June. Could you please send me the slides?
I'm not able to open the jar. Could you try?
I am not allowed to discuss the case, the officer told us.
I was unable to translate my feelings into words, so I baked.
The text on the stone is unclear, and scholars disagree about its meaning.
The passage between the islands is too narrow for large ships.
The prompt arrival of the doctor saved her life.
The information in the leaflet does not include the prices.
The paragraph is missing from the second edition of the book.
Your application does not include a photograph. Please send one by Friday.
Your request has been received, and we will answer within a week.
Your question is a good one, and the answer is long.
Please send me the full report by noon so that I can read it on the train.
Could you please provide me with the name of the dentist?
Could you clarify the second point on the agenda?
Can you tell me what you would like for dinner?
Please rewrite your essay and hand it in on Monday.
The teacher asked me to rewrite the essay, but I could not find my notes.
He asked me to translate the letter, and I cannot forget what it said.
I need more details about the wedding, such as the date and the number of guests.
There is no text in the book, only pictures of boats.
No changes have been made to the timetable.
The internet connection is slow here, so I can't see the video you sent.
This is not something I expected from the garden: strawberries in May!
It's not possible to be sad with a brass band under the window.
It would be wrong to say that nobody tried.
Violence is never an answer, my grandmother used to say.
The film contains explicit language and is not suitable for children.
The policy violates the rules of the city, the mayor said.
As an artist, I do not have a studio, I have a kitchen table.
As a model, she walked in Milan and Paris.
I'm a model of patience, but I cannot wait for ever.
AI cannot replace teachers, but it can help them.
My training ends in May, and then I will be a pilot.
I would need a ladder to reach the plums.
I do not understand what the fuss is about.
I'm not sure the bridge will hold.
I only read the first chapter, but I liked it.
I'm sorry, but the doctor is ill today and your appointment has been moved.
I'm sorry about your garden; the frost took ours as well.
I'm sorry, but I can't lend you the car again.
I'm sorry to bother you, but could you please send me the address of the hotel?
I'm sorry, but your proposal does not contain a budget, so we cannot approve it.
I'm sorry, I can't hear you over the music!
I'm sorry, but as your bank we cannot discuss this by email.
I'm sorry, sweetheart, I can't read you another story tonight.
I'm sorry that the cake was dry. Next time I'll use more butter.
I am sorry, but I am not able to join the call before ten.
I am sorry for your loss, and I am here if you need me.
Apologies for the late reply; I was on a ship without a signal.
Unfortunately, the second chapter is missing from my copy.
Unfortunately, our team lost, but the children sang all the way home.
I cannot open the door, the key has broken in the lock.
I cannot help but notice how empty the streets are.
I can't follow the plot of this film at all.
I can't support a team that never trains.
I can't complete my tax form, because the website keeps crashing.
I'm unable to find my glasses.
I'm not able to swim, but I love the sea.
I won't answer the phone after nine.
I do not have the time to read every letter, but I keep them.
I don't understand why the shop closed.
I'm not sure what to wear to the opera.
We can't provide parking for guests on Sunday.
We need more information to repair your bicycle, such as its make and model.
Please provide two references and a copy of your diploma.
Please paste the poster on the wall by the door.
Could you please give me a hand with the boxes?
Could you specify which size you would like?
Your order is incomplete: the lamp will follow next week.
Your letter was unclear, so we called your sister.
The request for more teachers was refused by the city.
The task is beyond the strength of one man, the farmer said.
The content of the bottle is unknown.
The text is set in a small type that my father could not read.
The passage to India took six months.
The story does not mention the mother, and I wonder why.
It is not possible to rewrite the past.
I can't answer your question about the missing silver, inspector, for I was in the garden.
I don't have enough information about the supplier to recommend a contract.
The text does not name its author, but scholars believe that it was a monk from Kent.
The text of the speech does not mention the miners, and therefore the unions stayed away.
The passage does not lead to the treasure, therefore we turned back.
The paragraph about overtime is unclear, and the union wants it rewritten.
The prompt payment discount does not apply to this invoice.
The question cannot be answered by science alone.
The task cannot be done by one person, so let us divide it.
Please send me the text of your toast, darling, so that ours don't clash.
What do you want me to do with your grandmother's piano?
How can I help you, young man? asked the witch, and closed the door.
How can I assist you today? The clerk at the hotel asked it of everyone, even of the cat.
I'd be happy to help you move, if you provide the pizza.
It is impossible to translate the smell of rain into words.
It is impossible to summarize her life in a single speech, so I will tell you about one day.
It is not possible to edit your order after it has shipped.
There's no need to change your shoes; we don't mind the mud.
No changes are needed to the budget, the treasurer reported.
The committee was unable to complete its task, because the documents had not been provided.
The chair said that the text of the motion was unclear and asked for it to be rewritten.
He asked me to rewrite the ending, but I can't. The hero has to die.
My editor wants me to rewrite the chapter, but I cannot bring myself to cut the dog.
I can't rewrite what the stars have written, nor erase your name from the sand.
I can't edit out the years we lost.
I cannot translate my grandmother's silence into any language.
I cannot paraphrase thunder, and I won't try to summarize the sea.
I can't convert a single friend to my diet.
I can't transform lead into gold, my lord, but I can make you a decent soup.
I don't understand your question, officer. I have lived here all my life.
I'm confused by your request to move my car, as I own a horse.
Dear Sir, I regret that I am unable to write the preface you requested, as my health has failed.
"Unfortunately, your request cannot be processed," droned the voice, and Ada hung up.
"""


def lines(text):
    """One text a line; a line that ends in a colon goes with what follows after the blank one."""
    return text.replace(":\n\n", ":\0\0").splitlines()


def test_refusals_and_non_answers_are_found():
    refusals = [text.replace("\0", "\n") for text in lines(REFUSALS)]
    missed = [text for text in refusals if not is_refusal(text)]
    assert len(set(refusals)) >= 200 and len(missed) <= 0.02 * len(refusals), missed


def test_true_rewrites_stay():
    rewrites = lines(TRUE_REWRITES)
    wrong = [text for text in rewrites if is_refusal(text)]
    assert len(set(rewrites)) >= 200 and wrong == []
    assert sum(text.startswith(("I'm sorry", "I am sorry")) for text in rewrites) >= 40


def test_of_the_hardest_lists_nine_of_ten_are_found_and_one_of_fifty_is_taken():
    refusals, rewrites = (
        (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
        for name in ("refusals.txt", "rewrites_alike.txt")
    )
    assert len(set(refusals)) >= 370 and len(set(rewrites)) >= 580
    assert sum(map(is_refusal, refusals)) >= 0.9 * len(refusals)
    assert sum(map(is_refusal, rewrites)) <= 0.02 * len(rewrites)


@pytest.mark.parametrize(
    "text",
    [
        "**I cannot rewrite this text.**",
        "[I\u2019m sorry, but I can\u2019t help with that request.]",
        "Response: I'm unable to edit the text, as it is empty.",
        "Sure! Here is the rewritten text:\n\nI am not able to rewrite the passage.",
        "I'm sorry.\n\nI cannot fulfill this request, because it asks for harmful content.",
    ],
)
def test_marks_and_labels_around_a_refusal_hide_nothing(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "The user is asking for a poem, because the rewritten text has rhymes.",
        "The user has asked for a shorter version of the original text.",
        "The text was shortened to one sentence, so the user wants a summary.",
        "The rewritten text keeps the facts but reads like a shanty: the prompt asked for a shanty.",
        "The instruction asks the model to make the text more formal.",
        "The rewrite does not mention the date, so it was not asked to keep all details.",
        "The rewritten text does not contain the greeting, so a more direct message was asked for.",
        "It is written in the style of Shakespeare, with thee and thou.",
        "The rewritten text refuses politely, so the prompt was to turn the order into a refusal.",
        "What changed is the tone: the request was probably to make it more dramatic.",
    ],
)
def test_reasons_speak_of_texts_and_prompts_too_and_are_no_refusals(text):
    """responses.reason_of asks the same rule."""
    assert not is_refusal(text)


def test_what_a_long_rewrite_says_later_is_no_refusal():
    start = "The ship left at dawn. " * 3
    assert not is_refusal(start + "I cannot rewrite this text. " * 3)
    assert not is_refusal("I can't do that. " + "He had said it a hundred times at sea. " * 10)


def test_a_million_texts_take_minutes_not_hours():
    """Patterns that go back and forth over a text would show here."""
    texts = ["I cannot " * 400, "the text " * 400, "a" * 5000, "you would like " * 300, "\n" * 5000]
    start = time.perf_counter()
    for text in texts * 20:
        is_refusal(text)
    assert time.perf_counter() - start < 5
