"""The research-only notice, in both languages, shown by chat, quickstart, reports and README.md."""

NOTICE_EN = (
    "For research only. This model can be wrong, incomplete or biased, and it has not been clinically validated. "
    "It must not be used to diagnose, to treat or to make any decision about a person's health. "
    "For medical advice ask a doctor or another qualified professional; in an emergency call your emergency number."
)

NOTICE_AR = (
    "لأغراض البحث العلمي فقط. قد يخطئ هذا النموذج، وقد تكون إجاباته ناقصة أو متحيزة، ولم يخضع لأي تحقق سريري. "
    "لا يجوز استخدامه للتشخيص أو للعلاج أو لاتخاذ أي قرار يتعلق بصحة أي إنسان. "
    "لطلب المشورة الطبية راجع طبيبًا أو مختصًا مؤهلًا، وفي الحالات الطارئة اتصل برقم الطوارئ في بلدك."
)
