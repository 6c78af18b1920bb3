"""What the stand-in server can say in the 93 languages: sentences of some, letters of all. Languages by their English names."""

SENTENCES = {
    "English": ("The old ferry leaves the harbour before the sun has risen.", "My neighbour grows tomatoes and beans behind the garage."),
    "German": ("Die alte Fähre verlässt den Hafen noch vor dem Sonnenaufgang.", "Mein Nachbar zieht Tomaten und Bohnen hinter der Garage."),
    "French": ("Le vieux bateau quitte le port avant le lever du soleil.", "Mon voisin cultive des tomates et des haricots derrière le garage."),
    "Spanish": ("El viejo barco sale del puerto antes de que amanezca.", "Mi vecino cultiva tomates y judías detrás del garaje."),
    "Polish": ("Stary prom wypływa z portu jeszcze przed wschodem słońca.", "Mój sąsiad uprawia pomidory i fasolę za garażem."),
    "Turkish": ("Eski vapur güneş doğmadan önce limandan ayrılıyor.", "Komşum garajın arkasında domates ve fasulye yetiştiriyor."),
    "Finnish": ("Vanha lautta lähtee satamasta ennen auringonnousua.", "Naapurini kasvattaa tomaatteja ja papuja autotallin takana."),
    "Vietnamese": ("Chiếc phà cũ rời bến cảng trước khi mặt trời mọc.", "Hàng xóm của tôi trồng cà chua và đậu phía sau nhà xe."),
    "Russian": ("Старый паром уходит из порта ещё до восхода солнца.", "Мой сосед выращивает помидоры и фасоль за гаражом."),
    "Ukrainian": ("Старий пором відходить із порту ще до сходу сонця.", "Мій сусід вирощує помідори та квасолю за гаражем."),
    "Greek": ("Το παλιό πλοίο φεύγει από το λιμάνι πριν βγει ο ήλιος.", "Ο γείτονάς μου καλλιεργεί ντομάτες και φασόλια πίσω από το γκαράζ."),
    "Arabic": ("تغادر العبارة القديمة الميناء قبل شروق الشمس.", "يزرع جاري الطماطم والفاصوليا خلف المرآب."),
    "Persian": ("کشتی قدیمی پیش از طلوع آفتاب از بندر می‌رود.", "همسایه‌ام پشت گاراژ گوجه‌فرنگی و لوبیا می‌کارد."),
    "Hebrew": ("המעבורת הישנה עוזבת את הנמל לפני הזריחה.", "השכן שלי מגדל עגבניות ושעועית מאחורי המוסך."),
    "Hindi": ("पुरानी नाव सूरज निकलने से पहले बंदरगाह से चली जाती है।", "मेरा पड़ोसी गैराज के पीछे टमाटर और सेम उगाता है।"),
    "Chinese": ("那艘旧渡轮在太阳升起之前就离开了港口，船上只有几个人。", "我的邻居在车库后面种西红柿和豆子，每天早上都去浇水。"),
    "Japanese": ("古いフェリーは日が昇る前に港を出て、島へ向かいます。", "隣の人はガレージの裏でトマトと豆を育てているそうです。"),
    "Korean": ("낡은 여객선은 해가 뜨기 전에 항구를 떠나 섬으로 갑니다.", "우리 이웃은 차고 뒤에서 토마토와 콩을 기르고 있습니다."),
    "Thai": ("เรือข้ามฟากลำเก่าออกจากท่าเรือก่อนพระอาทิตย์ขึ้น", "เพื่อนบ้านของฉันปลูกมะเขือเทศและถั่วไว้หลังโรงรถ"),
}
"""Long enough to tell the language of; the others are written in a few letters of their script."""

STRANGERS = {
    "English": "Polish", "German": "French", "French": "German", "Spanish": "Finnish", "Polish": "Spanish", "Turkish": "English", "Finnish": "Turkish",
    "Vietnamese": "English", "Russian": "Ukrainian", "Ukrainian": "Russian", "Arabic": "Persian", "Persian": "Arabic",
}  # fmt: skip
"""Whose sentences stand for the language of the same script in a wrong answer."""

LETTERS = {
    "Latin": "abdefgiklmnoprstuvz",
    "Amharic": "ሀለመሠረሰቀበተነ",
    "Arabic Persian Pashto Sindhi Urdu Uyghur": "ابتدرسعفقلمن",
    "Assamese Bengali": "অআইকগচজতদনপবমল",
    "Belarusian Bulgarian Kazakh Kyrgyz Macedonian Mongolian Russian Serbian Ukrainian": "абвгдежклмнопрст",
    "Greek": "αβγδεζηθικλμνοπρ",
    "Gujarati": "અઆઇકગચજતદનપબમલ",
    "Hebrew Yiddish": "אבגדהוזחטילמנ",
    "Hindi Marathi Nepali Sanskrit": "अआइकगचजतदनपबमल",
    "Armenian": "աբգդեզէըթժիլխ",
    "Japanese": "あいうえおかきくけこ日本山川",
    "Georgian": "აბგდევზთიკლმნოპ",
    "Khmer": "កខគឃងចឆជឈញ",
    "Kannada": "ಅಆಇಕಗಚಜತದನಪಬಮಲ",
    "Korean": "가나다라마바사아자차",
    "Lao": "ກຂຄງຈສຊຍດຕ",
    "Malayalam": "അആഇകഗചജതദനപബമല",
    "Burmese": "ကခဂဃငစဆဇညတ",
    "Odia": "ଅଆଇକଗଚଜତଦନପବମଲ",
    "Punjabi": "ਅਆਇਕਗਚਜਤਦਨਪਬਮਲ",
    "Sinhala": "අආඉකගචජතදනපබමල",
    "Tamil": "அஆஇகஙசஞடணதநபம",
    "Telugu": "అఆఇకగచజతదనపబమల",
    "Thai": "กขคงจฉชซดตถทนบ",
    "Chinese": "山水火木金土日月人大小上下",
}  # fmt: skip
"""Languages → letters; those that are not named are written in Latin ones."""

LETTERS_OF = {language: letters for languages, letters in LETTERS.items() for language in languages.split()}
