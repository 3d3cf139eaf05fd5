"""The wording of the synthetic reports: templates per finding, present and absent, and statements on what is normal.

`{place}` lobes, `{side}`, `{on_side}`, `{of_lung}`, `{size}` mm, `{grade}`, `{pattern}`, `{stations}`, `{vessels}`,
`{vertebra}`, `{ribs}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ABSENT", "CLINICAL", "IMPRESSION", "NORMAL", "ORDER", "PRESENT", "TECHNIQUE"]

# The order in which a reader goes through a chest; names in `NORMAL` are organs, all others findings.
ORDER: tuple[str, ...] = (
    "medical_material",
    "airways",
    "contrast",
    "cardiomegaly",
    "vessels",
    "arterial_wall_calcification",
    "coronary_artery_wall_calcification",
    "pericardial_effusion",
    "mediastinal_widening",
    "esophagus",
    "hiatal_hernia",
    "lymphadenopathy",
    "emphysema",
    "mosaic_attenuation_pattern",
    "pulmonary_edema",
    "ground_glass_opacity",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pulmonary_fibrotic_sequela",
    "interlobular_septal_thickening",
    "bronchiectasis",
    "peribronchial_thickening",
    "lung_nodule",
    "mass",
    "pleural_effusion",
    "pleural_thickening",
    "pneumothorax",
    "liver",
    "fracture",
)

PRESENT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "medical_material": {
        "": ("medical material is seen in the chest",),
        "pacemaker": (
            "a pacemaker is seen under the skin of the left chest wall, its lead ends in the right ventricle",
            "a cardiac pacing device lies in the left pectoral region with a lead running to the heart",
        ),
        "port catheter": (
            "a port chamber is seen in the right chest wall, the catheter tip lies in the superior vena cava",
            "there is a right-sided port catheter that ends in the superior vena cava",
        ),
        "sternal wires": (
            "metallic sternotomy wires and a prosthetic heart valve are observed",
            "there are sternal sutures after sternotomy, and a valve prosthesis is seen",
        ),
    },
    "cardiomegaly": {
        "": (
            "the heart is {grade}ly enlarged",
            "there is {grade} cardiomegaly",
            "heart size is increased to a {grade} degree",
        ),
    },
    "arterial_wall_calcification": {
        "": (
            "{grade} calcified atheromatous plaques are seen in the wall of the thoracic aorta",
            "the wall of the aorta shows {grade} atherosclerotic calcification",
            "there are calcifications of {grade} extent in the wall of the aortic arch and descending aorta",
        ),
    },
    "coronary_artery_wall_calcification": {
        "": (
            "{grade} calcified plaques are present in the {vessels}",
            "there is {grade} calcification of the wall of the {vessels}",
        ),
    },
    "pericardial_effusion": {
        "": (
            "there is a {grade} pericardial effusion with a thickness of up to {size} mm",
            "pericardial fluid measuring {size} mm at its thickest is seen, a {grade} pericardial effusion",
            "a {grade} pericardial effusion reaching {size} mm is observed",
        ),
    },
    "mediastinal_widening": {
        "": (
            "the upper mediastinum is widened by soft tissue in its anterior compartment",
            "widening of the upper mediastinum is noted, with homogeneous soft tissue in front of the great vessels",
        ),
    },
    "hiatal_hernia": {
        "": (
            "a {grade} hiatal hernia of about {size} mm is seen behind the heart",
            "part of the stomach has moved into the chest through the hiatus, a {grade} hiatal hernia",
            "there is a {grade} sliding type hiatal hernia measuring {size} mm",
        ),
    },
    "lymphadenopathy": {
        "": (
            "enlarged lymph nodes are seen in the {stations} stations, the largest with a short axis of {size} mm",
            "there is lymphadenopathy ({stations}), with a short diameter of up to {size} mm",
            "pathological lymph nodes with a short axis of up to {size} mm are found: {stations}",
        ),
    },
    "emphysema": {
        "": (
            "{grade} centrilobular emphysema is observed in {place}",
            "there are {grade} emphysematous changes in {place}",
            "numerous small air spaces of very low density in {place} are in keeping with {grade} emphysema",
        ),
    },
    "mosaic_attenuation_pattern": {
        "": (
            "a mosaic attenuation pattern is seen in both lungs",
            "both lungs show patchy areas of lower and higher density, a mosaic attenuation pattern",
        ),
    },
    "pulmonary_edema": {
        "": (
            "perihilar ground-glass densities with thickened interlobular septa are consistent with pulmonary edema",
            "bilateral perihilar ground-glass opacity with interlobular septal thickening suggests pulmonary edema",
        ),
    },
    "ground_glass_opacity": {
        "": (
            "patchy ground-glass opacities are observed in {place}",
            "there are ground-glass density increases in {place}, the largest about {size} mm across",
            "areas of ground-glass opacity up to {size} mm are present in {place}",
        ),
    },
    "consolidation": {
        "": (
            "consolidation with air bronchograms is seen in {place}",
            "there is an area of consolidation of about {size} mm in {place}",
            "airspace consolidation is observed in {place}, measuring up to {size} mm",
        ),
    },
    "pneumonia": {
        "": (
            "a {size} mm consolidation with a ground-glass halo in {place} is consistent with pneumonia",
            "pneumonic infiltration is present in {place}, with consolidation and adjacent ground-glass density",
        ),
    },
    "atelectasis": {
        "": (
            "atelectasis is seen in {place}",
            "there is subsegmental volume loss with atelectasis in {place}",
        ),
        "linear": (
            "linear atelectasis is observed in {place}",
            "band-like atelectatic changes are present in {place}",
        ),
        "segmental": (
            "a wedge-shaped segmental atelectasis is seen in {place}",
            "segmental atelectasis is present in {place}",
        ),
    },
    "pulmonary_fibrotic_sequela": {
        "": ("fibrotic sequela changes are seen in {place}",),
        "apical": (
            "pleuroparenchymal fibrotic sequela changes are seen at the apex of {of_lung}",
            "fibrotic bands and an apical cap of up to {size} mm, sequela in nature, are observed in {place}",
        ),
        "reticular": (
            "subpleural reticular fibrotic changes are observed in {place}",
            "there is basal fibrosis with honeycomb-like reticulation in {place}, sequela in nature",
        ),
    },
    "interlobular_septal_thickening": {
        "": (
            "interlobular septal thickening is present in both lungs",
            "the interlobular septa are thickened in both lungs",
        ),
    },
    "bronchiectasis": {
        "": (
            "{pattern} bronchiectasis is observed in {place}",
            "the bronchi of {place} are dilated up to {size} mm, in keeping with {pattern} bronchiectasis",
        ),
    },
    "peribronchial_thickening": {
        "": (
            "peribronchial thickening is seen in {place}",
            "bronchial walls are thickened up to {size} mm in {place}",
        ),
    },
    "lung_nodule": {
        "": (
            "pulmonary nodules are observed in {place}, the largest {size} mm",
            "a nodular lesion with a diameter of {size} mm is seen in {place}",
        ),
        "one solid": (
            "a solid nodule with a diameter of {size} mm is observed in {place}",
            "there is a {size} mm pulmonary nodule in {place}",
        ),
        "one calcified": (
            "a calcified nodule with a diameter of {size} mm is observed in {place}",
            "there is a calcified {size} mm pulmonary nodule in {place}",
        ),
        "several solid": (
            "several solid nodules are observed in {place}, the largest measuring {size} mm",
            "there are pulmonary nodules in {place} with diameters of up to {size} mm",
        ),
        "several calcified": (
            "several calcified nodules are observed in {place}, the largest measuring {size} mm",
            "there are calcified pulmonary nodules in {place} with diameters of up to {size} mm",
        ),
    },
    "mass": {
        "": (
            "a mass of {size} mm with lobulated, spiculated contours is seen in {place}",
            "there is a {size} mm mass lesion in {place}",
        ),
    },
    "pleural_effusion": {
        "": (
            "a {grade} pleural effusion is seen {on_side}, {size} mm at its deepest",
            "there is {grade} pleural effusion {on_side}, reaching a thickness of {size} mm",
            "{grade} amount of free pleural fluid is observed {on_side}",
        ),
    },
    "pleural_thickening": {
        "": (
            "pleural thickening of up to {size} mm is observed {on_side}",
            "the costal pleura is thickened {on_side}, measuring {size} mm",
        ),
        "calcified": (
            "calcified pleural thickening of up to {size} mm is observed {on_side}",
            "the costal pleura is thickened to {size} mm and partly calcified {on_side}",
        ),
    },
    "pneumothorax": {
        "": (
            "a {grade} pneumothorax is present {on_side}",
            "there is free air in the pleural space {on_side}, a {grade} pneumothorax with a depth of {size} mm",
        ),
    },
    "fracture": {
        "": ("a fracture is seen",),
        "rib": (
            "displaced fractures of the {ribs} ribs are seen {on_side}",
            "there are rib fractures {on_side} ({ribs})",
        ),
        "vertebral": (
            "there is loss of height of the {vertebra} vertebral body due to a compression fracture",
            "a wedge compression fracture of {vertebra} is observed",
        ),
    },
}

ABSENT: Mapping[str, Sequence[str]] = {
    "medical_material": ("no medical device is seen in the chest", "no catheter or implant was detected"),
    "cardiomegaly": (
        "heart size is within normal limits",
        "the heart is not enlarged",
        "cardiac contours and size are normal",
    ),
    "arterial_wall_calcification": (
        "no calcification is seen in the aortic wall",
        "aortic wall calcification was not detected",
    ),
    "coronary_artery_wall_calcification": (
        "no coronary artery calcification was detected",
        "the coronary arteries show no wall calcification",
    ),
    "pericardial_effusion": (
        "pericardial effusion was not detected",
        "there is no fluid in the pericardial space",
        "no pericardial effusion or thickening is seen",
    ),
    "mediastinal_widening": ("the mediastinum is not widened", "mediastinal width is normal"),
    "hiatal_hernia": ("no hiatal hernia was detected", "hiatal hernia is not seen"),
    "lymphadenopathy": (
        "no enlarged lymph nodes are seen in the mediastinum or at the hila",
        "lymph nodes of pathological size were not detected",
        "there is no mediastinal or hilar lymphadenopathy",
    ),
    "emphysema": ("no emphysematous change is observed", "emphysema was not detected"),
    "mosaic_attenuation_pattern": ("no mosaic attenuation pattern is seen", "lung density shows no mosaic pattern"),
    "pulmonary_edema": ("there are no signs of pulmonary edema", "pulmonary edema was not detected"),
    "ground_glass_opacity": ("no ground-glass opacity was detected", "there is no ground-glass density in the lungs"),
    "consolidation": ("no consolidation is seen in either lung", "consolidation was not detected"),
    "pneumonia": ("no finding in favor of pneumonia was detected", "there is no pneumonic infiltration"),
    "atelectasis": ("no atelectasis is observed", "atelectasis was not detected"),
    "pulmonary_fibrotic_sequela": ("no fibrotic sequela change is seen", "there are no fibrotic changes in the lungs"),
    "interlobular_septal_thickening": (
        "the interlobular septa are not thickened",
        "no interlobular septal thickening was detected",
    ),
    "bronchiectasis": ("the bronchi are not dilated", "bronchiectasis was not detected"),
    "peribronchial_thickening": ("bronchial wall thickness is normal", "no peribronchial thickening is seen"),
    "lung_nodule": ("no pulmonary nodule was detected", "there is no nodule in either lung"),
    "mass": ("no mass lesion was detected in the lungs", "there is no pulmonary mass"),
    "pleural_effusion": (
        "pleural effusion was not detected",
        "there is no pleural effusion on either side",
        "no fluid is seen in the pleural spaces",
    ),
    "pleural_thickening": ("pleural thickening was not observed", "the pleura is not thickened"),
    "pneumothorax": ("pneumothorax was not detected", "there is no pneumothorax"),
    "fracture": (
        "no fracture line is seen in the bones",
        "no fracture was detected in the bones within the study area",
    ),
}

NORMAL: Mapping[str, Sequence[str]] = {
    "airways": (
        "the trachea and both main bronchi are open",
        "trachea and main bronchi are patent without any obstructing lesion",
        "the lumen of the trachea and of the main bronchi is clear",
    ),
    "trachea": ("the trachea is in the midline and open", "the lumen of the trachea is clear"),
    "contrast": (
        "evaluation of the mediastinum is limited because no contrast medium was given",
        "mediastinal structures are assessed as far as an unenhanced study allows",
    ),
    "vessels": (
        "the calibers of the great vessels are normal",
        "thoracic aorta and pulmonary arteries are of normal width",
    ),
    "esophagus": (
        "the esophagus is of normal caliber without wall thickening",
        "no pathology is seen along the esophagus",
    ),
    "liver": (
        "the upper abdominal organs in the field of view appear normal",
        "no abnormality is seen in the visible part of the liver and spleen",
    ),
    "fatty liver": (
        "liver density is lower than that of the spleen, consistent with steatosis",
        "the density of the liver is reduced, which suggests fatty infiltration",
    ),
}

IMPRESSION: Mapping[str, Sequence[str]] = {
    "": ("No significant pathology was detected in the thorax", "Thoracic CT within normal limits"),
    "medical_material": ("{pattern} in place", "Status after placement of medical material ({pattern})"),
    "cardiomegaly": ("Cardiomegaly", "{grade} enlargement of the heart"),
    "arterial_wall_calcification": ("Aortic atherosclerosis with wall calcification", "Calcified plaques of the aorta"),
    "coronary_artery_wall_calcification": ("Coronary artery calcification", "Calcified coronary atherosclerosis"),
    "pericardial_effusion": ("Pericardial effusion", "{grade} pericardial effusion"),
    "mediastinal_widening": ("Mediastinal widening", "Widened upper mediastinum, further evaluation is advised"),
    "hiatal_hernia": ("Hiatal hernia", "{grade} hiatal hernia"),
    "lymphadenopathy": ("Mediastinal and hilar lymphadenopathy", "Lymphadenopathy up to {size} mm"),
    "emphysema": ("Emphysema", "{grade} emphysema"),
    "mosaic_attenuation_pattern": (
        "Mosaic attenuation pattern in both lungs",
        "Mosaic attenuation, possibly small airway disease",
    ),
    "pulmonary_edema": ("Pulmonary edema", "Findings consistent with pulmonary edema"),
    "ground_glass_opacity": (
        "Ground-glass opacities in {place}",
        "Ground-glass densities, infection should be excluded",
    ),
    "consolidation": ("Consolidation in {place}", "Airspace consolidation, {place}"),
    "pneumonia": ("Pneumonia in {place}", "Findings consistent with pneumonia in {place}"),
    "atelectasis": ("Atelectasis in {place}", "Atelectatic changes"),
    "pulmonary_fibrotic_sequela": ("Fibrotic sequela changes in {place}", "Pulmonary fibrotic sequela"),
    "interlobular_septal_thickening": ("Interlobular septal thickening", "Thickened interlobular septa in both lungs"),
    "bronchiectasis": ("Bronchiectasis in {place}", "Bronchiectatic changes in {place}"),
    "peribronchial_thickening": ("Peribronchial thickening", "Thickened bronchial walls in {place}"),
    "lung_nodule": (
        "Pulmonary nodule up to {size} mm, follow-up is recommended",
        "Nodule formation of up to {size} mm in {place}",
    ),
    "mass": ("Mass of {size} mm in {place}, suspicious for malignancy", "Pulmonary mass, histology is advised"),
    "pleural_effusion": ("Pleural effusion {on_side}", "{grade} pleural effusion {on_side}"),
    "pleural_thickening": ("Pleural thickening {on_side}", "Thickened pleura {on_side}"),
    "pneumothorax": ("Pneumothorax {on_side}", "{grade} pneumothorax {on_side}"),
    "fracture": ("Fracture as described", "Bone fracture"),
}

CLINICAL: Sequence[str] = (
    "Cough.",
    "Shortness of breath.",
    "Chest pain.",
    "Fever and cough.",
    "Follow-up.",
    "Suspected infection.",
    "Preoperative evaluation.",
    "Weight loss.",
)

TECHNIQUE: Mapping[str, Sequence[str]] = {
    "plain": (
        "Axial images of the thorax were acquired without contrast medium.",
        "An unenhanced CT of the chest was obtained in the axial plane.",
        "Thin axial slices were taken without intravenous contrast.",
    ),
    "contrast": (
        "Axial images of the thorax were acquired after intravenous contrast medium.",
        "A contrast-enhanced CT of the chest was obtained in the axial plane.",
    ),
}
