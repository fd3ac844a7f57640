"""A short bilingual list of frequent words of medicine and of exams, to tell whether two texts have the same subject.

An English entry is the beginning of words (`cardi` of cardiac and cardiology); with `$` it is a whole word, or its
plural. An Arabic entry is the beginning of a word without its prefixes, or of the same word after `letters`. An entry
lists the usual renderings, broken plurals included, so that a sound translation rarely has none of them.
"""

import functools
import re

from bimedix_jax.curation.arabic import letters, plain, stems, words

_ENTRIES = """
patient|مريض مرض مصاب
disease,illness,sickness$|مرض امراض داء ادواء اعتلال علل مرضي
blood,hemat,haemat|دم دماء دمو نزف
heart,cardi,myocard|قلب قلوب عضله
brain$,cerebr,encephal|دماغ مخ ادمغه عقل سحايا
lung$,pulmon|رئه رئو رئت صدر تنفس
liver,hepat|كبد اكباد
kidney,renal,nephr|كلي كلو كليه كلا نفرون
bone$,skelet,osteo|عظم عظام عظمي هيكل هشاشه
muscle,muscul|عضل عضلات
nerve$,neur|عصب اعصاب عصبون عصبي نيورون
skin$,dermat,cutaneous|جلد بشره ادمه
stomach,gastr|معد معده بطن هضم
intestin,bowel,enteri,entero|امعاء معوي معو معي قناه هضم
eye$,ocular,ophthalm,vision,visual|عين عيون اعين بصر عيني رؤيه نظر
ear$,hearing,audit|اذن سمع اذان
foot$,feet$|قدم اقدام قدمين
child$,children,pediatr,paediatr,boy$,girl$|طفل اطفال ولد صبي فتاه بنت صبيه
woman$,women$,female|امراه نساء انثي سيده اناث انثوي مريضه
man$,men$,male$,males$|رجل رجال ذكر ذكور ذكري شخص
infant,newborn,neonat,baby,babies|رضيع رضع مولود وليد طفل ولاده اطفال
pregnan|حمل حامل حوامل
birth$,births$|ولاده ولد مولود توصيل ايصال توليد تقديم
mother|ام والده امهات امومه
father|اب والد اباء
cell$,cellular|خليه خلايا خلوي خلو
gene$,genes$,genet|جين جينات وراث مورث جيني
chromosom|كروموسوم صبغي كروموزوم صبغ
protein|بروتين
enzym|انزيم خميره
hormon|هرمون
insulin|انسولين
glucose,sugar|جلوكوز غلوكوز سكر
diabet|سكري سكر ديابيت
vitamin|فيتامين
virus,viral|فيروس حمه
bacteri|بكتيري بكتير جرثوم جراثيم
infect|عدوي صاب يصاب تصاب التهاب اصاب مصاب انتان معد خمج اخماج
antibiotic|مضاد صاد
vaccin,immuniz,immunis|لقاح تطعيم تلقيح تحصين لقح
immun|مناع منيع حصان تمنيع مناعي
cancer,carcinom,tumor,tumour,malignan|سرطان ورم اورام خبيث
pain$,pains$,painful,ache$|الم وجع الام مؤلم
fever|حمي حراره محموم
cough|سعال سعل يسعل
headache|صداع راس
symptom|عرض اعراض
treat,therap|علاج عولج معالج دواء عالج تداوي
drug$,medic|دواء ادويه طب عقار عقاقير دوائي مداواه علاج
dose$,dosage|جرعه جرعات
surger,surgic,surgeon,operation|جراح عمليه جراحي
hospital|مستشف مشف
doctor,physician|طبيب اطباء دكتور
nurs|ممرض تمريض رضاع ارضاع
diagnos|تشخيص شخص
test$,tests$,testing|اختبار فحص تحليل اختبارات فحوص تحاليل خصيه
examin,exam$|فحص امتحان كشف معاين
age$,aged$,year$,years$|عمر عام سن سنه سنوات اعوام عاما بالغ مسن شيخوخه
month$|شهر اشهر شهور
week$|اسبوع اسابيع
day$|يوم ايام يومي نهار
hour$|ساعه ساعات
minute$|دقيقه دقائق
water|ماء مياه مائ
acid|حمض حامض احماض
oxygen|اكسجين اوكسجين
carbon|كربون
sodium|صوديوم
potassium|بوتاسيوم
calcium|كالسيوم
iron$|حديد
energy|طاق
membrane|غشاء اغشيه غشائ
nucleus,nuclei|نواه نوي انويه
plant$|نبات نبت
animal|حيوان
food|غذاء طعام اكل اغذيه طعم
diet,nutri|غذاء غذائي حميه تغذي
weight|وزن اوزان
pressure|ضغط
temperature|حراره
rate$,rates$|معدل نسبه سرعه وتيره
risk|خطر مخاطر خطوره
cause$,causes$,caused$,causing$|سبب ادا ادت ينجم تنجم ينتج تسبب يسبب اسباب ادي تؤدي يؤدي ناجم ناتج
treatment|علاج معالج
population|سكان مجتمع تعداد جماعه عشير
study$,studies$|دراس
research|بحث ابحاث باحث
infarct|احتشاء
hypertens|ضغط فرط ارتفاع
arter|شريان شرايين
vein$,venous|وريد اورده وريدي
vessel|وعاء اوعيه وعائ
anemi,anaemi|فقر انيميا
fractur|كسر كسور
bleed,hemorrh,haemorrh|نزيف نزف ينزف
inflamm|التهاب
ulcer|قرحه قرح تقرح
asthma|ربو
pneumon|رئو رئه
tubercul|سل درن
urin|بول مسالك
stool$,stools$,fec,faec|براز غائط
breath,respir|تنفس نفس
sleep|نوم نام
smok|تدخين يدخن مدخن دخان سيجار
alcohol|كحول
allerg|حساسي تحسس ارج
muscle|عضل
joint$|مفصل مفاصل
tooth,teeth,dental,dent|سن اسنان
mouth,oral$|فم فمو افواه
nose$,nasal|انف انوف
throat|حلق حنجر بلعوم
neck$,cervic|عنق رقب رقبه
chest|صدر
leg$|ساق رجل سيقان
arm$|ذراع عضد
head$|راس رؤوس
facial|وجه
finger|اصبع اصابع
hair$|شعر
death,die$,dies$,died$,dead$,mortal|موت وفا توف مات ميت يموت وفيات
life$,live$,living|حيا عيش يعيش حي
reaction|تفاعل رد
function$|وظيف دال عمل اداء
structure$|بني تركيب هيكل بنيه
system$|جهاز نظام اجهزه منظوم
organ$|عضو اعضاء جهاز
tissue|نسيج انسجه
fluid|سائل سوائل
growth$,grow$|نمو نمي ينمو
increas|زياد ازداد يزيد تزيد ارتف ازدياد زاد تزايد رفع
decreas,reduc|انخف نقص قلل تقليل تخفيض خفض انقاص قل تناقص اختزال يقلل تقلل حد
high$,higher$|شديد زياد علو ارتفع كبر كثر عال اعلي مرتف ارتفاع كبير
low$,lower$|قليل ضعيف ضعف انخفض منخف اقل ادني سفل انخفاض اسفل خفض
normal|طبيع عاد سوي سليم
abnormal|شاذ طبيع غير خلل
chronic|مزمن
acute|حاد
left$|ايسر يسار يسر ترك غادر بقي متبق
right$|الحق احق ايمن يمين يمني حق حقوق صحيح
follow|تال تلي يلي اتب تاب عقب متاب الات تبع يتب
likely|محتمل ارجح احتمال مرجح محتمله ترجيح غالب
statement|عبار بيان جمل تصريح مقول افاد
correct|صحيح صواب تصحيح
true$|صحيح صواب حقيق
false$|خاط خطا كاذب غير زائف
describ|وصف يصف صف
associat|ارتب مرتب يرتبط مصاحب رابط جمعي مقترن علاق ترتبط
result$|نتيج نتائج ناتج نجم ينتج اسفر تنتج
contain|احتو يحتو حتوي تحتو ضم
produc|انتاج ينتج منتج تنتج نتج
transmi|نقل انتشار انتق ينتق تنتق ساري
prevent|وقاي منع تجنب يمنع حؤول
contagio|معد عدوي
pandemic|جائح وباء
epidemi|وباء وبائ اوبئه
quarantin,isolat|حجر عزل
mask$|قناع كمام اقنعه
world$,global|عالم
country,countries|بلد دول بلدان
city,cities|مدين مدن
government|حكوم
law$|قانون قوانين
school|مدرس مدارس كلي
universit|جامع
student|طالب طلاب طلب
teacher|معلم مدرس
money|مال نقود اموال
company,companies|شرك
war$|حرب حروب
king$|ملك
church|كنيس
music|موسيق
language|لغ لغات
light$|ضوء نور خفيف ضوئ
sound$|صوت سليم
force$|قوه قوات قوي
acceler|تسار تسري معجل
number$|عدد رقم اعداد
percent|مئ مائ نسب
average|متوسط معدل وسط
probabilit|احتمال
allele|اليل
trait$|صف سم صفات
mutation|طفر
parent$|والد ابو اهل ام ابوين
sperm|حيوان مني نطف منو
ovary,ovarian|مبيض
uter|رحم
thyroid|درقي
pancrea|بنكرياس
spine,spinal,vertebr|شوك عمود فقر نخاع
reflex|منعكس انعكاس
artery|شريان شرايين
exercise|تمرين رياض تمارين
"""
MIN_CONCEPTS = 3
"""Least number of entries in one text of which none is in the other, for the two to be unrelated."""


@functools.cache
def _tables() -> tuple[dict[str, int], dict[str, int], tuple[tuple[str, ...], ...]]:
    """Whole English words, beginnings of English words, and the Arabic beginnings of each entry."""
    whole: dict[str, int] = {}
    begin: dict[str, int] = {}
    arabic = []
    for number, line in enumerate(_ENTRIES.split("\n")[1:-1]):
        english, renderings = line.split("|")
        for word in english.split(","):
            (whole if word.endswith("$") else begin)[word.removesuffix("$")] = number
        arabic.append(tuple(letters(word) for word in renderings.split()))
    return whole, begin, tuple(arabic)


def english(text: str) -> set[int]:
    """Entries in an English text."""
    whole, begin, _ = _tables()
    found = set()
    for word in set(re.findall(r"[a-z]+", text.lower())):
        for end in range(len(word), 2, -1):
            number = begin.get(word[:end])
            if number is not None:
                found.add(number)
                break
        singular = word.removesuffix("s")
        number = whole.get(word, whole.get(singular))
        if number is not None:
            found.add(number)
    return found


def rendering(word: str) -> str | None:
    """The beginning of an Arabic word for an English one, None for a word that no entry has."""
    found = english(word)
    return _tables()[2][min(found)][0] if found else None


def arabic(text: str, entries: set[int]) -> set[int]:
    """Those of `entries` that are in an Arabic text."""
    _, _, beginnings = _tables()
    forms = " " + " ".join(stem for word in set(words(plain(text))) for stem in stems(word))
    return {number for number in entries if any(f" {begin}" in forms for begin in beginnings[number])}


def subjects(source: str, translation: str) -> tuple[int, int]:
    """How many entries an English text has, and how many of them are in its Arabic translation."""
    wanted = english(source)
    return len(wanted), len(arabic(translation, wanted)) if wanted else 0
